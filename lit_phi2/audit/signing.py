"""Signing: a signature over every file of a folder, by the package model-signing, without a network.

    folder, private key (PEM, elliptic curve)  ->  model.sig in the folder
    folder, public key                         ->  the files that are not those that were signed

The package is optional: pip install "lit-phi2[audit]".
"""

import re
from pathlib import Path
from typing import Any

from lit_phi2.errors import InputError

SIGNATURE_FILE = "model.sig"

_INSTALL = 'it needs the package model-signing. Install it with: pip install "lit-phi2[audit]"'


def check_private_key(key: Path) -> None:
    """Refuse a key that cannot sign, or a missing package, before anything is exported.

    Raises:
        InputError: names --sign.
    """
    signing = _import("--sign", "signing")
    _check_file(key, "--sign")
    try:
        signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:  # of many kinds, by cryptography
        raise InputError(
            f"--sign {key}: cannot be used ({type(error).__name__}: {_first_line(error)}). Expected a private key on "
            "an elliptic curve, in PEM form, without a password: openssl ecparam -name prime256v1 -genkey -noout"
        ) from error


def sign_folder(folder: Path, key: Path) -> None:
    """Sign every file in a folder; a signature that it has is replaced."""
    signing, hashing = _import("--sign", "signing"), _import("--sign", "hashing")
    folder = folder.absolute()  # relative paths are not ignored
    file = folder / SIGNATURE_FILE
    file.unlink(missing_ok=True)
    files = hashing.Config().set_ignored_paths(paths=[file])
    signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(files).sign(folder, file)


def verify_folder(folder: Path, public_key: Path) -> list[str]:
    """What is wrong with the signature of a folder, or with the files that it covers; empty if nothing is.

    Raises:
        InputError: the package or the key is missing, or the key cannot be read.
    """
    verifying = _import("--public_key", "verifying")
    _check_file(public_key, "--public_key")
    folder = folder.absolute()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise InputError(
            f"--public_key {public_key}: cannot be used ({type(error).__name__}: {_first_line(error)}). Expected the "
            "public key of --sign, in PEM form: openssl ec -in KEY -pubout"
        ) from error
    try:
        # Files that nobody signed, such as an empty .lock, are compared with provenance.json instead.
        config.set_ignore_unsigned_files(True).verify(folder, folder / SIGNATURE_FILE)
    except Exception as error:
        return _problems(error, folder)
    return []


def _problems(error: Exception, folder: Path) -> list[str]:
    text = str(error)
    changed = re.findall(r"Hash mismatch for \\?'(.+?)\\?': Expected", text)  # in a list, whose quotes are escaped
    missing = re.findall(r"Cannot use '([^']+)' as file", text)
    if changed or missing:
        names = [f"{name} is not the file that was signed" for name in changed]
        return names + [f"{Path(name).name} is missing" for name in missing]
    if "Key mismatch" in text:
        return ["was signed with another key"]
    return [f"is not valid ({type(error).__name__}: {_first_line(error)})".replace(str(folder), folder.name)]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _check_file(file: Path, flag: str) -> None:
    if not file.is_file():
        raise InputError(f"{flag} {file}: no such file.")


def _import(flag: str, module: str) -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise InputError(f"{flag}: {_INSTALL}") from error
    return getattr(model_signing, module)
