//! go-plugin's AutoMTLS, for hosts that ask for it (Nomad does not): each side makes a certificate for this one
//! connection and pins the other's.
//!
//! The host's certificate is marked as a CA and used as a leaf, on curve P-521. WebPKI's rules refuse that, but they do
//! not apply here: the certificate comes from the parent process, through the environment. So it is compared byte by
//! byte, and only the proof of the private key is left to rustls.

use std::sync::Arc;

use base64::Engine as _;
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

/// Why TLS could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The host's certificate can't be read.
    #[error("PLUGIN_CLIENT_CERT is not a PEM certificate")]
    ClientCertificate(#[source] rustls::pki_types::pem::Error),
    /// The plugin's own certificate can't be made.
    #[error("could not make the plugin's TLS certificate")]
    Certificate(#[from] rcgen::Error),
    /// rustls refuses the configuration.
    #[error("could not set up TLS for the plugin's socket")]
    Setup(#[from] Error),
}

/// The server's TLS configuration and its certificate.
#[derive(Debug)]
pub(crate) struct ServerTls {
    /// The configuration for the accept loop.
    pub config: Arc<rustls::ServerConfig>,
    /// The server's certificate in base64 without padding, which is field 6 of the handshake line.
    pub certificate: String,
}

/// Makes a new certificate, and a TLS configuration that accepts only the holder of `client_pem`.
///
/// # Errors
/// When the client's certificate can't be read, or TLS can't be set up.
pub(crate) fn server_tls(client_pem: &str) -> Result<ServerTls, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let pinned = CertificateDer::from_pem_slice(client_pem.as_bytes()).map_err(TlsError::ClientCertificate)?;
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&key)?;
    let der = certificate.der().clone();
    let encoded = base64::engine::general_purpose::STANDARD_NO_PAD.encode(&der);
    let verifier = Arc::new(PinnedClientCert { leaf: pinned, provider: provider.clone() });
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|problem| Error::General(problem.to_owned()))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![der], key)?;
    // grpc-go refuses a server that negotiates no ALPN protocol.
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(ServerTls { config: Arc::new(config), certificate: encoded })
}

/// Accepts exactly one client certificate.
#[derive(Debug)]
struct PinnedClientCert {
    leaf: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for PinnedClientCert {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if *end_entity == self.leaf {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(rustls::CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
