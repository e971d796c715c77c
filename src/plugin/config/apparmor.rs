//! The options for AppArmor: an agent's `security { apparmor }`, and a job's `security_opt = ["apparmor=..."]`.

use super::faults::Faults;
use crate::{
    ids::Flavor,
    plugin::decode::Values,
    task::{AppArmorDefault, AppArmorRequest, SecuritySettings},
};

/// Reads the agent's `security { apparmor }`.
pub(super) fn agent_default(security: &Values, flavor: Flavor, faults: &mut Faults) -> AppArmorDefault {
    match security.non_empty_text("apparmor") {
        None if flavor == Flavor::ContainerdDriver => AppArmorDefault::Unconfined,
        None => AppArmorDefault::WhereSupported,
        Some("default") => AppArmorDefault::Own,
        Some("unconfined") => AppArmorDefault::Unconfined,
        Some(name) => match faults.record_err("security.apparmor", name.parse()) {
            Some(name) => AppArmorDefault::Named(name),
            None => AppArmorDefault::Own,
        },
    }
}

/// Reads `value`, which follows `apparmor=` in the job's `option`. Every job may ask for the node's profile. The
/// operator decides whether jobs may ask for another profile or none.
pub(super) fn job_request(
    option: &str,
    value: &str,
    security: &SecuritySettings,
    faults: &mut Faults,
) -> Option<AppArmorRequest> {
    let request = match value {
        "default" => return Some(AppArmorRequest::Confined),
        "unconfined" => AppArmorRequest::Unconfined,
        name => AppArmorRequest::Named(faults.record_err(&format!("security_opt: {option:?}"), name.parse())?),
    };
    if !security.allow_apparmor_override {
        faults.push(format!(
            "security_opt: {option:?} is not allowed on this node (plugin option security {{ allow_apparmor_override }})"
        ));
    }
    Some(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ids::DriverName, plugin::config};
    use rmpv::Value as MsgpackValue;

    fn block(name: &str, entries: &[(&str, MsgpackValue)]) -> Vec<u8> {
        let map = entries.iter().map(|(key, value)| (MsgpackValue::from(*key), value.clone())).collect();
        let wire = MsgpackValue::Map(vec![(MsgpackValue::from(name), MsgpackValue::Map(map))]);
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &wire).expect("in memory");
        bytes
    }

    fn agent(driver: &str, security: &[(&str, MsgpackValue)]) -> Result<SecuritySettings, String> {
        let driver = DriverName::new(driver).expect("a name");
        let settings = config::settings(&driver, &block("security", security));
        settings.map(|settings| settings.security).map_err(|error| error.to_string())
    }

    #[test]
    fn tasks_are_confined_by_default_unless_the_driver_is_called_containerd_driver() {
        let (strict, compatible) =
            (agent("shim", &[]).expect("valid"), agent("containerd-driver", &[]).expect("valid"));
        assert_eq!((strict.apparmor, strict.allow_apparmor_override), (AppArmorDefault::WhereSupported, false));
        assert_eq!((compatible.apparmor, compatible.allow_apparmor_override), (AppArmorDefault::Unconfined, true));
        for driver in ["shim", "containerd-driver"] {
            let parsed = |value: &str| {
                agent(driver, &[("apparmor", MsgpackValue::from(value))]).map(|security| security.apparmor)
            };
            assert_eq!(parsed("default"), Ok(AppArmorDefault::Own));
            assert_eq!(parsed("unconfined"), Ok(AppArmorDefault::Unconfined));
            assert_eq!(parsed("docker-default"), Ok(AppArmorDefault::Named("docker-default".parse().expect("a name"))));
            for odd in ["&x", " x", "x\ny", "a//&b"] {
                let problem = parsed(odd).expect_err("refused");
                assert!(problem.contains("security.apparmor: ") && !problem.contains('\n'), "{problem}");
            }
        }
    }

    #[test]
    fn a_job_may_ask_for_the_nodes_profile_and_for_others_where_they_are_allowed() {
        let request = |option: &str, allowed: bool| {
            let security = agent("shim", &[("allow_apparmor_override", MsgpackValue::from(allowed))]).expect("valid");
            let (_, value) = option.split_once('=').expect("a value");
            let mut faults = Faults::default();
            let request = super::job_request(option, value, &security, &mut faults);
            if faults.0.is_empty() { Ok(request.expect("a request")) } else { Err(faults.0.join("; ")) }
        };
        let named = AppArmorRequest::Named("mine".parse().expect("a name"));
        assert_eq!(request("apparmor=default", false), Ok(AppArmorRequest::Confined));
        assert_eq!(request("apparmor=unconfined", true), Ok(AppArmorRequest::Unconfined));
        assert_eq!(request("apparmor=mine", true), Ok(named));
        for option in ["apparmor=unconfined", "apparmor=mine", "apparmor=docker-default"] {
            let problem = request(option, false).expect_err("refused");
            assert!(problem.contains(option) && problem.contains("allow_apparmor_override"), "{problem}");
        }
        for odd in ["apparmor=", "apparmor=&unconfined", "apparmor=mine//&unconfined"] {
            let problem = request(odd, true).expect_err("refused");
            assert!(problem.contains(odd) && problem.contains("is not the name of"), "{problem}");
        }
    }
}
