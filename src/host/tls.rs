//! The host's side of go-plugin's AutoMTLS. The certificate is like that of go-plugin itself: P-521, marked as a CA.

use std::sync::Arc;

use base64::Engine as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsConnector;

use super::HostError;

/// A certificate and its key for one connection.
pub(crate) struct Identity {
    certificate: rcgen::Certificate,
    key: rcgen::KeyPair,
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> HostError {
    HostError::Tls(error.into())
}

impl Identity {
    /// Creates a new key and a self-signed certificate.
    pub(crate) fn new() -> Result<Self, HostError> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).map_err(failed)?;
        let mut parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).map_err(failed)?;
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Ok(Self { certificate: parameters.self_signed(&key).map_err(failed)?, key })
    }

    /// Returns the certificate for the environment variable `PLUGIN_CLIENT_CERT`.
    pub(crate) fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// Returns a connector that accepts only a server with the certificate `server`, which comes from the handshake
    /// line.
    pub(crate) fn connector(self, server: &str) -> Result<TlsConnector, HostError> {
        let server = base64::engine::general_purpose::STANDARD_NO_PAD.decode(server).map_err(failed)?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from(server)).map_err(failed)?;
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).map_err(failed)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(failed)?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![self.certificate.der().clone()], key)
            .map_err(failed)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(TlsConnector::from(Arc::new(config)))
    }
}
