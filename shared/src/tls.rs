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
    ssl_mode: &'static str,
    verify: Verify,
    root_cert: Option<String>,
}

impl Tls {
    /// What a DSN's parameters say of TLS, and those that `tokio_postgres` reads: it knows no
    /// `verify-ca`, `verify-full` or `sslrootcert`.
    ///
    /// # Errors
    /// When `sslmode` makes no sense; without it, since it may be part of something else.
    pub(crate) fn taken_from<'a>(
        parameters: impl Iterator<Item = (&'a str, String)>,
    ) -> anyhow::Result<(Vec<(&'a str, String)>, Self)> {
        let (mut mode, mut root_cert, mut rest) = (None, None, Vec::new());
        for (key, value) in parameters {
            match key {
                "sslmode" => mode = Some(value),
                "sslrootcert" => root_cert = Some(value),
                _ => rest.push((key, value)),
            }
        }
        let (ssl_mode, mut verify) = match mode.as_deref() {
            Some("disable" | "allow") => ("disable", Verify::Nothing),
            None | Some("prefer") => ("prefer", Verify::Nothing),
            Some("require") => ("require", Verify::Nothing),
            Some("verify-ca") => ("require", Verify::Chain),
            Some("verify-full") => ("require", Verify::Full),
            Some(_) => bail!("has an sslmode that is not one of disable, prefer, require, verify-ca, verify-full"),
        };
        // As libpq: whoever gives a root certificate wants it checked.
        if ssl_mode == "require" && verify == Verify::Nothing && root_cert.is_some() {
            verify = Verify::Chain;
        }
        Ok((rest, Self { ssl_mode, verify, root_cert }))
    }

    /// As `tokio_postgres` knows it.
    pub(crate) fn mode(&self) -> &'static str {
        self.ssl_mode
    }

    #[cfg(test)]
    pub(crate) fn root_cert(&self) -> Option<&str> {
        self.root_cert.as_deref()
    }
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
    fn how_far_the_server_is_trusted_is_what_libpq_would_do() {
        for (mode, root_cert, mode_of_client, verify) in [
            (None, None, "prefer", Verify::Nothing),
            (Some("allow"), None, "disable", Verify::Nothing),
            (Some("require"), None, "require", Verify::Nothing),
            (Some("require"), Some("ca.pem"), "require", Verify::Chain),
            (Some("verify-ca"), None, "require", Verify::Chain),
            (Some("verify-full"), Some("ca.pem"), "require", Verify::Full),
        ] {
            let given = [("sslmode", mode), ("host", Some("h")), ("sslrootcert", root_cert)];
            let given = given.into_iter().filter_map(|(key, value)| Some((key, value?.to_owned())));
            let (rest, tls) = Tls::taken_from(given).unwrap();
            assert_eq!(rest, [("host", "h".to_owned())]);
            assert_eq!((tls.mode(), tls.verify, tls.root_cert()), (mode_of_client, verify, root_cert), "{mode:?}");
        }
        assert!(Tls::taken_from([("sslmode", "sometimes".to_owned())].into_iter()).is_err());
    }
}
