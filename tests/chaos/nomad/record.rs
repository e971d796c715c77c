//! The history and the model of a run with a real agent. Faults report here which attempts they may have struck.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::model::Model;
use crate::{
    ground::{Journal, Site},
    history::History,
    model::Hit,
    observe,
    step::Target,
};

/// The state of a run that all its parts share.
pub(super) struct Record {
    pub dir: PathBuf,
    pub namespace: String,
    pub history: History,
    model: Mutex<Model>,
}

impl Record {
    pub(super) fn new(site: &Site, model: Model) -> Self {
        let (dir, namespace) = (site.dir.clone(), site.namespace.clone());
        Self { dir, namespace, history: History::new(), model: Mutex::new(model) }
    }

    pub(super) fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Journal for Record {
    fn note(&self, what: &str) {
        self.history.note(what);
    }

    fn hit(&self, hit: &Hit) {
        let now = self.history.now();
        self.model().hit(hit, now);
    }

    fn fault_begins(&self) {
        let now = self.history.now();
        self.model().fault_begins(now);
    }

    fn fault_ends(&self) {
        let now = self.history.now();
        self.model().fault_ends(now);
    }

    fn struck(&self, kind: Option<String>) {
        let now = self.history.now();
        let mut model = self.model();
        let Some(kind) = kind else { return model.figures.missed += 1 };
        let ends_plugin =
            ["SIGKILL of the plugin", "SIGTERM of the plugin", "in place", "and the plugin", "SIGTERM of the agent"];
        if ends_plugin.iter().any(|text| kind.contains(text)) {
            model.plugin_died(now);
        } else if ["shim", "OCI runtime", "containerd", "SIGSTOP of the plugin"].iter().any(|text| kind.contains(text))
        {
            model.struck_at_start(now);
        }
        model.figures.struck(kind);
    }

    fn plugin(&self) -> Option<u32> {
        // A plugin whose agent was killed may still run concurrently with its successor, which has the higher process
        // id.
        observe::victims(Target::Plugin, &self.dir, &self.namespace, 0).last().map(|victim| victim.pid)
    }
}
