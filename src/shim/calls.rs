//! Calls in which a shim runs an OCI runtime.
//!
//! A shim kills the runtime that it has called when the connection of its caller breaks. So a plugin that leaves lets the
//! calls at work end first, and makes no new ones.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

/// The calls of one plugin. Cheap to clone; all clones count together.
#[derive(Debug, Clone, Default)]
pub struct RuntimeCalls(Arc<watch::Sender<Calls>>);

#[derive(Debug, Clone, Copy, Default)]
struct Calls {
    at_work: usize,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    /// All calls are made.
    #[default]
    Open,
    /// The plugin leaves: calls that end something are made, calls that begin something are not.
    Leaving,
    /// No call is made any more.
    Closed,
}

/// What a call does for a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// It makes a container or a process.
    Begin,
    /// It belongs to one that was made before.
    Continue,
}

/// A call is at work until this is dropped.
#[derive(Debug)]
pub struct RuntimeCall(RuntimeCalls);

impl Drop for RuntimeCall {
    fn drop(&mut self) {
        self.0.0.send_modify(|calls| calls.at_work -= 1);
    }
}

impl RuntimeCalls {
    /// Says that a call is at work. Does not return once the plugin leaves and makes no such calls any more: what is left to
    /// do is the next plugin's.
    pub async fn begin(&self, purpose: Purpose) -> RuntimeCall {
        let may_begin = self.0.send_if_modified(|calls| {
            let admitted = match calls.phase {
                Phase::Open => true,
                Phase::Leaving => purpose == Purpose::Continue,
                Phase::Closed => false,
            };
            calls.at_work += usize::from(admitted);
            admitted
        });
        if !may_begin {
            std::future::pending::<()>().await;
        }
        RuntimeCall(self.clone())
    }

    /// Waits for the calls at work, and makes none any more afterwards: true when all have ended within `limit`.
    pub async fn finish(&self, limit: Duration) -> bool {
        self.0.send_modify(|calls| calls.phase = Phase::Leaving);
        let mut calls = self.0.subscribe();
        let idle = tokio::time::timeout(limit, async {
            // A call may begin between the wait and the closing.
            while !self.close_if_idle() {
                let _ = calls.wait_for(|calls| calls.at_work == 0).await;
            }
        });
        let all = idle.await.is_ok();
        self.0.send_modify(|calls| calls.phase = Phase::Closed);
        all
    }

    fn close_if_idle(&self) -> bool {
        self.0.send_if_modified(|calls| {
            let idle = calls.at_work == 0;
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

    const SOON: Duration = Duration::from_millis(20);

    async fn is_made(calls: &RuntimeCalls, purpose: Purpose) -> bool {
        tokio::time::timeout(SOON, calls.begin(purpose)).await.is_ok()
    }

    #[tokio::test]
    async fn calls_at_work_end_and_only_their_sequels_are_made() {
        let calls = RuntimeCalls::default();
        let create = calls.begin(Purpose::Begin).await;
        let leaving = tokio::spawn({
            let calls = calls.clone();
            async move { calls.finish(Duration::from_secs(60)).await }
        });
        tokio::time::sleep(SOON).await;
        assert!(!is_made(&calls, Purpose::Begin).await, "nothing new");
        assert!(is_made(&calls, Purpose::Continue).await, "what ends something");
        assert!(!leaving.is_finished());
        drop(create);
        assert!(leaving.await.expect("no panic"));
        assert!(!is_made(&calls, Purpose::Continue).await, "nothing at all afterwards");
    }

    #[tokio::test]
    async fn a_call_that_hangs_is_not_waited_for_for_ever() {
        let calls = RuntimeCalls::default();
        let _hangs = calls.begin(Purpose::Continue).await;
        assert!(!calls.finish(SOON).await);
        assert!(!is_made(&calls, Purpose::Continue).await);
    }
}
