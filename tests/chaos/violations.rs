//! The violations that were found in a run, for the models of both agents.

use std::collections::HashMap;

use crate::{model::Init, step::TaskNumber};

/// Keeps each violation once, except for those that are ignored.
#[derive(Debug, Default)]
pub(crate) struct Violations {
    found: Vec<String>,
    ignored: Vec<String>,
}

impl Violations {
    /// Ignores each violation that contains one of these texts.
    pub(crate) fn ignoring(ignored: &[String]) -> Self {
        Self { found: Vec::new(), ignored: ignored.to_vec() }
    }

    pub(crate) fn found(&self) -> &[String] {
        &self.found
    }

    pub(crate) fn add(&mut self, what: String) {
        let is_ignored = self.ignored.iter().any(|text| what.contains(text));
        if !is_ignored && !self.found.contains(&what) {
            self.found.push(what);
        }
    }

    /// Checks the containers that are alive at one moment: never two of one task.
    pub(crate) fn add_doubles(&mut self, inits: &[Init]) {
        let mut by_task: HashMap<TaskNumber, Vec<Init>> = HashMap::new();
        for init in inits {
            by_task.entry(init.attempt.0).or_default().push(*init);
        }
        for (task, alive) in by_task.into_iter().filter(|(_, alive)| alive.len() > 1) {
            self.add(format!("task {task} runs twice: {alive:?}"));
        }
    }
}
