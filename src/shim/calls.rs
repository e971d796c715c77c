//! Counts the calls in which a shim runs an OCI runtime.
//!
//! When the connection of a caller breaks, the shim kills the runtime that it runs for that caller. A plugin that shuts
//! down therefore starts no new calls and waits for the calls in progress.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

/// Counts the runtime calls of one plugin. It is cheap to clone, and all clones share one count.
#[derive(Debug, Clone, Default)]
pub struct RuntimeCalls(Arc<watch::Sender<Calls>>);

#[derive(Debug, Clone, Copy, Default)]
struct Calls {
    in_progress: usize,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    /// All calls are admitted.
    #[default]
    Open,
    /// The plugin shuts down. Calls for existing containers and processes are admitted, calls that create new ones are
    /// not.
    ShuttingDown,
    /// No call is admitted any more.
    Closed,
}

/// Whether a call creates a container or process, or belongs to an existing one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallKind {
    /// The call creates a container or a process.
    Create,
    /// The call belongs to a container or process that an earlier call has created.
    FollowUp,
}

/// A guard that counts a call as in progress until the guard is dropped.
#[derive(Debug)]
pub struct RuntimeCallGuard(RuntimeCalls);

impl Drop for RuntimeCallGuard {
    fn drop(&mut self) {
        self.0.0.send_modify(|calls| calls.in_progress -= 1);
    }
}

impl RuntimeCalls {
    /// Counts a call as in progress while the returned guard exists. Once the plugin shuts down and admits no calls of
    /// this kind, this never returns: the next plugin does the remaining work.
    pub async fn begin(&self, kind: CallKind) -> RuntimeCallGuard {
        let may_begin = self.0.send_if_modified(|calls| {
            let admitted = match calls.phase {
                Phase::Open => true,
                Phase::ShuttingDown => kind == CallKind::FollowUp,
                Phase::Closed => false,
            };
            calls.in_progress += usize::from(admitted);
            admitted
        });
        if !may_begin {
            std::future::pending::<()>().await;
        }
        RuntimeCallGuard(self.clone())
    }

    /// Waits until the calls in progress have ended, for at most `limit`, and admits no call afterwards. Returns
    /// whether all calls have ended in time.
    pub async fn drain(&self, limit: Duration) -> bool {
        self.0.send_modify(|calls| calls.phase = Phase::ShuttingDown);
        let mut calls = self.0.subscribe();
        let idle = tokio::time::timeout(limit, async {
            // A call may begin after the wait has ended and before the phase is closed.
            while !self.close_if_idle() {
                let _ = calls.wait_for(|calls| calls.in_progress == 0).await;
            }
        });
        let all_ended = idle.await.is_ok();
        self.0.send_modify(|calls| calls.phase = Phase::Closed);
        all_ended
    }

    fn close_if_idle(&self) -> bool {
        self.0.send_if_modified(|calls| {
            let idle = calls.in_progress == 0;
            if idle {
                calls.phase = Phase::Closed;
            }
            idle
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT_TIMEOUT: Duration = Duration::from_millis(20);

    async fn is_admitted(calls: &RuntimeCalls, kind: CallKind) -> bool {
        tokio::time::timeout(SHORT_TIMEOUT, calls.begin(kind)).await.is_ok()
    }

    #[tokio::test]
    async fn calls_in_progress_end_and_only_follow_up_calls_are_admitted() {
        let calls = RuntimeCalls::default();
        let create = calls.begin(CallKind::Create).await;
        let draining = tokio::spawn({
            let calls = calls.clone();
            async move { calls.drain(Duration::from_secs(60)).await }
        });
        tokio::time::sleep(SHORT_TIMEOUT).await;
        assert!(!is_admitted(&calls, CallKind::Create).await, "no new container is created");
        assert!(is_admitted(&calls, CallKind::FollowUp).await, "an existing container can be ended");
        assert!(!draining.is_finished());
        drop(create);
        assert!(draining.await.expect("no panic"));
        assert!(!is_admitted(&calls, CallKind::FollowUp).await, "no call is admitted afterwards");
    }

    #[tokio::test]
    async fn a_call_that_hangs_is_waited_for_until_the_limit() {
        let calls = RuntimeCalls::default();
        let _hangs = calls.begin(CallKind::FollowUp).await;
        assert!(!calls.drain(SHORT_TIMEOUT).await);
        assert!(!is_admitted(&calls, CallKind::FollowUp).await);
    }
}
