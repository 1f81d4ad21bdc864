"""The primitives of secure aggregation, all of `cryptography` and of Flower's utilities.

X25519 agrees on keys (RFC 7748), HKDF derives them (RFC 5869), AES-256 in counter mode is the
mask, ChaCha20-Poly1305 seals what clients send each other (RFC 8439), Shamir's scheme shares
secrets.
"""

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares

KEY_BYTES = 32
MASK, SEAL, OWN = b"mask", b"seal", b"own"  # what a derived key is for


def new_secret() -> bytes:
    """Draw a private key of X25519."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(secret: bytes) -> bytes:
    """Give the public key of a private one."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes, purpose: bytes, occasion: bytes) -> bytes:
    """Derive the key that the owners of two private keys share.

    Args:
        secret: one's own private key; public: the other's public key.
        purpose: what it is for.
        occasion: names run and round.

    Raises:
        ValueError: no public key.
    """
    shared = X25519PrivateKey.from_private_bytes(secret).exchange(
        X25519PublicKey.from_public_bytes(public)
    )
    return derive(shared, purpose, occasion)


def derive(secret: bytes, purpose: bytes, occasion: bytes) -> bytes:
    """Derive a key of 32 bytes from a secret."""
    hkdf = HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=purpose + b"|" + occasion)
    return hkdf.derive(secret)


def mask(key: bytes, count: int) -> np.ndarray:
    """Stretch a key, which is used for nothing else, to uniform numbers: uint32 (count,)."""
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(4 * count)), np.dtype("<u4"))


def seal(key: bytes, text: bytes) -> bytes:
    """Encrypt and authenticate by a key that seals only this one text."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, None)


def unseal(key: bytes, data: bytes) -> bytes:
    """Open what `seal` closed.

    Raises:
        ValueError: it was changed, or sealed by another key.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), data, None)
    except InvalidTag as error:
        raise ValueError("a sealed share was changed on its way") from error


def share(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Cut a secret into shares, of which `threshold` give it back and fewer tell nothing."""
    return create_shares(secret, threshold, count)


def combine(shares: list[bytes]) -> bytes:
    """Put a secret together again.

    Raises:
        ValueError: these shares are of no secret, or of several.
    """
    return combine_shares(shares)
