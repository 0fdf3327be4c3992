"""Valid and invalid certificates for servers on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def issue(folder: Path, hosts: Mapping[str, str]) -> None:
    """Writes the trusted `ca.pem` and, for the address of each kind of host, `KIND.pem` with key and certificate.

    The kinds `expired` and `self_signed` are invalid.
    """
    now = datetime.now(timezone.utc)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    for kind, host in {"ca": "", **hosts}.items():
        key = ca_key if kind == "ca" else ec.generate_private_key(ec.SECP256R1())
        signer, issuer = (key, kind) if kind == "self_signed" else (ca_key, "ca")
        named = x509.IPAddress(ip_address(host)) if host else x509.DNSName("ca.example")
        end = now - timedelta(days=1) if kind == "expired" else now + timedelta(days=1)
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, kind)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=kind == "ca", path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([named]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .sign(signer, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{kind}.pem").write_bytes(private + made.public_bytes(pem))
