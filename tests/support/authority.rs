//! A certificate authority in memory, for fake registries under any name.

use std::{fs, path::PathBuf, sync::Arc};

use nomad_driver_shim::ids::random_hex;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use super::services::root;

/// An authority that a plugin trusts if `SSL_CERT_FILE` names the authority's certificate.
pub(crate) struct Authority {
    /// The file with the authority's certificate.
    pub file: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let file = root().join(format!("authority-{}.pem", random_hex(4)));
        fs::write(&file, parameters.self_signed(&key).unwrap().pem()).unwrap();
        Self { file, issuer: Issuer::new(parameters, key) }
    }

    /// Returns a TLS acceptor for a server with these names and addresses.
    pub(crate) fn server(&self, names: &[&str]) -> TlsAcceptor {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}
