"""An adapter in the form of each runtime that people use, checked in that runtime."""
