//! The choice of a task's AppArmor profile. The job's option comes first, then the operator's option, then what the
//! host supports.

use std::time::Duration;

use super::{Engine, StartRequest, runtime::Runtime};
use crate::rootfs::apparmor::{AppArmorError, Loader, ProfileName, Support};

/// How long a fingerprint waits for a profile that is being loaded. The agent waits for the fingerprint meanwhile.
const FINGERPRINT_TIMEOUT: Duration = Duration::from_secs(2);

/// The operator's option, as error messages name it.
const OPERATOR_OPTION: &str = "security.apparmor";
/// The job's option, as error messages name it.
const JOB_OPTION: &str = "security_opt";

/// An option asks for a profile that is not available.
#[derive(Debug, thiserror::Error)]
#[error("{option}")]
pub struct ProfileError {
    /// The option that asks for the profile, the job's or the operator's.
    option: &'static str,
    source: AppArmorError,
}

impl ProfileError {
    /// Says whether another attempt is likely to succeed.
    pub(super) fn is_transient(&self) -> bool {
        matches!(self.source, AppArmorError::Load { .. } | AppArmorError::List { .. })
    }
}

/// The agent's option `security { apparmor }`: the profile of tasks whose job names none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AppArmorDefault {
    /// The option is not set: the driver's own profile, if the host supports it.
    WhereSupported,
    /// The driver's own profile. Without it, tasks are refused.
    Own,
    /// No profile.
    Unconfined,
    /// A profile that the operator has loaded.
    Named(ProfileName),
}

/// A job's option `security_opt = ["apparmor=..."]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum AppArmorRequest {
    /// The option is not set: the operator's profile, and no profile for a privileged task.
    #[default]
    Unset,
    /// The operator's profile, or the driver's own if the operator set none. This holds for privileged tasks, too.
    Confined,
    /// No profile.
    Unconfined,
    /// This profile, which must be loaded.
    Named(ProfileName),
}

/// The profile that a task is to have.
#[derive(Debug, PartialEq, Eq)]
enum ProfileChoice<'a> {
    None,
    OwnWhereSupported,
    Own,
    Named(&'a ProfileName),
}

/// Chooses between the job's option and the operator's. As in docker, a privileged task has no profile unless its job
/// asks for one (moby/moby, daemon/oci_linux.go `WithApparmor`).
fn choose_profile<'a>(
    request: &'a AppArmorRequest,
    privileged: bool,
    default: &'a AppArmorDefault,
) -> ProfileChoice<'a> {
    match (request, default) {
        (AppArmorRequest::Unconfined, _) => ProfileChoice::None,
        (AppArmorRequest::Named(name), _) => ProfileChoice::Named(name),
        (AppArmorRequest::Unset, _) if privileged => ProfileChoice::None,
        (AppArmorRequest::Unset, AppArmorDefault::Unconfined) => ProfileChoice::None,
        (AppArmorRequest::Unset, AppArmorDefault::WhereSupported) => ProfileChoice::OwnWhereSupported,
        (AppArmorRequest::Confined | AppArmorRequest::Unset, AppArmorDefault::Named(name)) => {
            ProfileChoice::Named(name)
        }
        (AppArmorRequest::Confined, _) | (AppArmorRequest::Unset, AppArmorDefault::Own) => ProfileChoice::Own,
    }
}

/// Chooses the profile of a task and makes sure that it is loaded. A task without a profile keeps the agent's label,
/// which usually is `unconfined`.
///
/// # Errors
/// When the profile is not available.
pub(super) async fn profile_of_task(
    loader: &Loader,
    default: &AppArmorDefault,
    request: &StartRequest,
    runtime: &Runtime,
) -> Result<Option<ProfileName>, ProfileError> {
    let options = &request.options;
    let outcome = if runtime.gvisor.is_some() {
        refuse_in_sandbox(loader, &options.apparmor, &runtime.name)
    } else {
        ensure_loaded(loader, choose_profile(&options.apparmor, options.privileged, default)).await
    };
    let option = if options.apparmor == AppArmorRequest::Unset { OPERATOR_OPTION } else { JOB_OPTION };
    outcome.map_err(|source| ProfileError { option, source })
}

/// runsc ignores profiles (google/gvisor, runsc/specutils `ValidateSpec`), and its sandbox has filters of its own. A
/// job that asks for a profile is refused, since it would not get one.
fn refuse_in_sandbox(
    loader: &Loader,
    request: &AppArmorRequest,
    runtime: &str,
) -> Result<Option<ProfileName>, AppArmorError> {
    let profile = match request {
        AppArmorRequest::Unset | AppArmorRequest::Unconfined => return Ok(None),
        AppArmorRequest::Confined => loader.name(),
        AppArmorRequest::Named(name) => name,
    };
    Err(AppArmorError::Sandbox { profile: profile.to_string(), runtime: runtime.to_owned() })
}

/// Makes sure that a profile is loaded.
async fn ensure_loaded(loader: &Loader, wanted: ProfileChoice<'_>) -> Result<Option<ProfileName>, AppArmorError> {
    match wanted {
        ProfileChoice::None => Ok(None),
        ProfileChoice::OwnWhereSupported => match loader.ensure().await {
            // docker, too, treats a host without `apparmor_parser` as one without AppArmor (containerd/containerd,
            // pkg/apparmor `hostSupports`). Debian's kernel has AppArmor enabled even if the package is not installed.
            Err(AppArmorError::Unsupported { .. } | AppArmorError::NoParser(_)) => Ok(None),
            outcome => outcome.map(|()| Some(loader.name().clone())),
        },
        ProfileChoice::Own => loader.ensure().await.map(|()| Some(loader.name().clone())),
        ProfileChoice::Named(name) if name == loader.name() => loader.ensure().await.map(|()| Some(name.clone())),
        ProfileChoice::Named(name) => {
            let support = loader.host().support();
            if support != Support::Enabled {
                return Err(AppArmorError::Unsupported { profile: name.to_string(), support });
            }
            if loader.host().is_loaded(name)? {
                return Ok(Some(name.clone()));
            }
            Err(AppArmorError::NotLoaded(name.to_string()))
        }
    }
}

/// Loads the driver's own profile into the kernel in the background, if it is the profile of this node's tasks.
pub(super) fn load_own_profile(loader: Loader, default: AppArmorDefault) {
    match (default, loader.host().support(), loader.host().parser()) {
        (AppArmorDefault::Unconfined | AppArmorDefault::Named(_), ..) => {}
        (_, Support::Disabled, _) => tracing::debug!("the kernel does not support AppArmor"),
        (_, support @ Support::NoSecurityFs, _) => {
            tracing::warn!(%support, "tasks run without an AppArmor profile, although the kernel has AppArmor");
        }
        (_, Support::Enabled, None) => {
            tracing::warn!(
                "AppArmor is enabled, but apparmor_parser is not installed: tasks run without a profile, unless it is loaded already"
            );
        }
        (_, Support::Enabled, Some(_)) => {
            tokio::spawn(async move {
                if let Err(error) = loader.refresh().await {
                    tracing::error!(
                        error = %crate::error_chain(&error),
                        "could not refresh the AppArmor profile of this driver"
                    );
                }
            });
        }
    }
}

impl Engine {
    /// Returns the profile of tasks whose job names none, or `unconfined`. Loads the driver's own profile again if it
    /// was unloaded.
    ///
    /// # Errors
    /// The reason why such tasks can't be started.
    pub async fn default_apparmor_profile(&self) -> Result<String, String> {
        let loader = &self.context().apparmor;
        let wanted = choose_profile(&AppArmorRequest::Unset, false, &self.settings().security.apparmor);
        match tokio::time::timeout(FINGERPRINT_TIMEOUT, ensure_loaded(loader, wanted)).await {
            Ok(Ok(profile)) => Ok(profile.map_or_else(|| "unconfined".to_owned(), |name| name.to_string())),
            Ok(Err(source)) => Err(crate::error_chain(&ProfileError { option: OPERATOR_OPTION, source })),
            Err(_) => Err(format!("AppArmor profile {:?} is still being loaded", loader.name().as_str())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::DriverName,
        rootfs::apparmor::{AppArmorHost, DriverProfile},
    };

    fn name(name: &str) -> ProfileName {
        name.parse().expect("a name")
    }

    #[test]
    fn the_job_comes_first_and_privileged_tasks_are_unconfined() {
        use AppArmorDefault as Default;
        use AppArmorRequest as Request;
        let (operators, jobs) = (Default::Named(name("node")), Request::Named(name("job")));
        for (request, privileged, default, expected) in [
            (Request::Unset, false, &Default::WhereSupported, ProfileChoice::OwnWhereSupported),
            (Request::Unset, false, &Default::Own, ProfileChoice::Own),
            (Request::Unset, false, &Default::Unconfined, ProfileChoice::None),
            (Request::Unset, false, &operators, ProfileChoice::Named(&name("node"))),
            (Request::Unset, true, &Default::WhereSupported, ProfileChoice::None),
            (Request::Unset, true, &Default::Own, ProfileChoice::None),
            (Request::Unset, true, &operators, ProfileChoice::None),
            // A task that asks for a profile never runs without one.
            (Request::Confined, false, &Default::WhereSupported, ProfileChoice::Own),
            (Request::Confined, true, &Default::Unconfined, ProfileChoice::Own),
            (Request::Confined, true, &operators, ProfileChoice::Named(&name("node"))),
            (Request::Unconfined, false, &operators, ProfileChoice::None),
            (jobs.clone(), true, &operators, ProfileChoice::Named(&name("job"))),
        ] {
            assert_eq!(choose_profile(&request, privileged, default), expected, "{request:?} {privileged} {default:?}");
        }
    }

    #[test]
    fn a_sandbox_has_no_profile_and_says_so() {
        let loader = Loader::new(AppArmorHost::default(), DriverProfile::of(&DriverName::new("shim").expect("a name")));
        for fine in [AppArmorRequest::Unset, AppArmorRequest::Unconfined] {
            assert_eq!(refuse_in_sandbox(&loader, &fine, "runsc").expect("nothing is asked for"), None);
        }
        for (request, named) in
            [(AppArmorRequest::Confined, "nomad-driver-shim-shim"), (AppArmorRequest::Named(name("x")), "\"x\"")]
        {
            let error = refuse_in_sandbox(&loader, &request, "runsc").expect_err("refused").to_string();
            assert!(error.contains(named) && error.contains("runtime \"runsc\""), "{error}");
        }
    }
}
