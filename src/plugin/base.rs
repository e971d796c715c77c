//! The base service: the plugin's name, its options and its configuration. This service opens no engine and touches
//! nothing of tasks: at each start of an agent, Nomad starts three processes of the plugin, two of them only for this
//! service.

use tonic::{Code, Request, Response, Status};

use super::{config, convert, options::PLUGIN_OPTIONS, schema, service::DriverService, status};
use crate::pb::base::{
    ConfigSchemaRequest, ConfigSchemaResponse, PluginInfoRequest, PluginInfoResponse, PluginType, SetConfigRequest,
    SetConfigResponse, base_plugin_server::BasePlugin,
};

/// The driver API version of every Nomad since 0.9.
const DRIVER_API_VERSION: &str = "v0.1.0";

/// The base service.
#[derive(Debug)]
pub(crate) struct Base {
    driver: DriverService,
}

impl Base {
    /// Creates the base service of the plugin that `driver` serves.
    pub(crate) fn new(driver: DriverService) -> Self {
        Self { driver }
    }
}

#[tonic::async_trait]
impl BasePlugin for Base {
    async fn plugin_info(&self, _: Request<PluginInfoRequest>) -> Result<Response<PluginInfoResponse>, Status> {
        Ok(Response::new(PluginInfoResponse {
            r#type: PluginType::Driver.into(),
            plugin_api_versions: vec![DRIVER_API_VERSION.to_owned()],
            plugin_version: concat!("v", env!("CARGO_PKG_VERSION")).to_owned(),
            name: self.driver.name().to_string(),
        }))
    }

    async fn config_schema(&self, _: Request<ConfigSchemaRequest>) -> Result<Response<ConfigSchemaResponse>, Status> {
        Ok(Response::new(ConfigSchemaResponse { spec: Some(schema::to_hclspec(PLUGIN_OPTIONS)) }))
    }

    async fn set_config(&self, request: Request<SetConfigRequest>) -> Result<Response<SetConfigResponse>, Status> {
        let request = request.into_inner();
        let mut settings = config::settings(self.driver.name(), &request.msgpack_config)
            .map_err(|error| status::from_config_error(&error))?;
        let topology = request.nomad_config.and_then(|config| config.driver).and_then(|driver| driver.topology);
        settings.compute = convert::compute(topology.as_ref());
        let configured = self.driver.configure(settings).await;
        configured.map_err(|refusal| status::new(Code::FailedPrecondition, &refusal.to_string()))?;
        Ok(Response::new(SetConfigResponse {}))
    }
}
