//! The harness itself: dockerd runs containers, and their outcomes are what the containers did.

use libtest_mimic::Failed;

use crate::{docker::docker, support::Image};

/// Runs containers to their end, and one that is executed in and stopped.
pub(crate) async fn runs_containers() -> Result<(), Failed> {
    let image = docker().load(&Image::busybox(), "harness").await;
    let outcome = docker().run(&image, &["--env", "A=1"], &["sh", "-c", "echo $A; echo error >&2; exit 3"]).await;
    assert_eq!((outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str()), (3, "1\n", "error\n"));
    let script = "trap 'echo stopped; exit 4' TERM; echo ready; while :; do sleep 0.1; done";
    let container = docker().start(&image, &["--hostname", "api"], &["sh", "-c", script]).await;
    container.says("ready").await;
    assert_eq!(container.exec(&[], &["hostname"]).await.stdout, "api\n");
    let outcome = container.stop(30).await;
    assert_eq!((outcome.code, outcome.stdout.as_str()), (4, "ready\nstopped\n"));
    Ok(())
}
