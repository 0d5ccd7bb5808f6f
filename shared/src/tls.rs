//! TLS to PostgreSQL as libpq has it: `sslmode` and `sslrootcert` of the DSN.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _};
use tokio_postgres_rustls::MakeRustlsConnect;

/// How far the server's certificate is trusted (PostgreSQL manual, "SSL Support", table 34.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verify {
    /// `prefer`, `require`: encrypted, whoever answers.
    Nothing,
    /// `verify-ca`: the chain, not the name.
    Chain,
    /// `verify-full`: chain and name.
    Full,
}

/// What the DSN says of TLS.
#[derive(Debug)]
pub(crate) struct Tls {
    verify: Verify,
    root_cert: Option<String>,
}

/// Splits the DSN into what `tokio_postgres` reads and what only we do: it knows no
/// `verify-ca`, `verify-full` or `sslrootcert`.
pub(crate) fn of_dsn(dsn: &str) -> anyhow::Result<(String, Tls)> {
    let mut mode = None;
    let mut root_cert = None;
    let mut keep = |pair: &&str| match pair.split_once('=') {
        Some(("sslmode", value)) => {
            mode = Some(value.trim_matches('\'').to_owned());
            false
        }
        Some(("sslrootcert", value)) => {
            root_cert = Some(percent_decoded(value.trim_matches('\'')));
            false
        }
        _ => true,
    };
    let rest = if dsn.starts_with("postgres://") || dsn.starts_with("postgresql://") {
        let (address, query) = dsn.split_once('?').unwrap_or((dsn, ""));
        let query: Vec<_> = query.split('&').filter(|pair| !pair.is_empty()).filter(&mut keep).collect();
        (address.to_owned(), query, '?', "&")
    } else if !dsn.contains('=') {
        bail!("POSTGRES_DSN is neither postgres://user:password@host:port/database nor pairs of key=value")
    } else {
        let pairs: Vec<_> = dsn.split_whitespace().filter(&mut keep).collect();
        (String::new(), pairs, ' ', " ")
    };
    let (sslmode, mut verify) = match mode.as_deref() {
        Some("disable" | "allow") => ("disable", Verify::Nothing),
        None | Some("prefer") => ("prefer", Verify::Nothing),
        Some("require") => ("require", Verify::Nothing),
        Some("verify-ca") => ("require", Verify::Chain),
        Some("verify-full") => ("require", Verify::Full),
        Some(other) => {
            bail!("POSTGRES_DSN: sslmode={other} is not one of disable, prefer, require, verify-ca, verify-full")
        }
    };
    // As libpq: whoever gives a root certificate wants it checked.
    if sslmode == "require" && verify == Verify::Nothing && root_cert.is_some() {
        verify = Verify::Chain;
    }
    let (address, mut pairs, first, between) = rest;
    let sslmode = format!("sslmode={sslmode}");
    pairs.push(&sslmode);
    Ok((format!("{address}{first}{}", pairs.join(between)).trim().to_owned(), Tls { verify, root_cert }))
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
        match (byte, hex) {
            (b'%', Some(decoded)) => {
                bytes.push(decoded);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(crate) fn connector(tls: &Tls) -> anyhow::Result<MakeRustlsConnect> {
    let provider = Arc::new(ring::default_provider());
    let inner = match tls.verify {
        Verify::Nothing => None,
        Verify::Chain | Verify::Full => Some(
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots(tls.root_cert.as_deref())?), provider.clone())
                .build()
                .context("sslrootcert holds no usable certificate")?,
        ),
    };
    let verifier = Arc::new(Verifier { inner, name: tls.verify == Verify::Full, provider: provider.clone() });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("setting up TLS")?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

/// The certificates of `sslrootcert`; the system's where it is absent or says `system`.
fn roots(path: Option<&str>) -> anyhow::Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    match path {
        Some(path) if path != "system" => {
            let certificates = CertificateDer::pem_file_iter(path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .with_context(|| format!("POSTGRES_DSN: sslrootcert={path} cannot be read"))?;
            for certificate in certificates {
                store.add(certificate).with_context(|| format!("sslrootcert={path}"))?;
            }
        }
        _ => {
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if store.is_empty() {
        bail!("no root certificate to check PostgreSQL's with: give sslrootcert=FILE in POSTGRES_DSN");
    }
    Ok(store)
}

#[derive(Debug)]
struct Verifier {
    inner: Option<Arc<WebPkiServerVerifier>>,
    name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use rustls::{CertificateError, Error};
        let Some(inner) = &self.inner else { return Ok(ServerCertVerified::assertion()) };
        match inner.verify_server_cert(end_entity, intermediates, server_name, ocsp, now) {
            // The chain has been checked before the name is.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.name => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dsn_says_of_tls_is_taken_out_of_it() {
        let (dsn, tls) =
            of_dsn("postgres://u@h/db?sslmode=verify-full&sslrootcert=%2Fa%20b.pem&options=-c%20x%3Dy").unwrap();
        assert_eq!(dsn, "postgres://u@h/db?options=-c%20x%3Dy&sslmode=require");
        assert_eq!((tls.verify, tls.root_cert.as_deref()), (Verify::Full, Some("/a b.pem")));

        let (dsn, tls) = of_dsn("host=h sslmode=require dbname=d sslrootcert=ca.pem").unwrap();
        assert_eq!(dsn, "host=h dbname=d sslmode=require");
        assert_eq!(tls.verify, Verify::Chain);

        assert!(of_dsn("postgres://h?sslmode=sometimes").is_err());
        assert_eq!(of_dsn("postgres://h/d").unwrap().0, "postgres://h/d?sslmode=prefer");
    }
}
