//! The model notices each kind of damage, and accepts what faults may cause.

use std::time::Duration;

use super::*;

const BATCH: Work = Work::Batch { code: 3, lines: 2, pause_ms: 0 };
const LATER: Duration = Duration::from_secs(1000);

/// A model with one task, whose first attempt runs.
fn running(work: Work) -> Model {
    let mut model = Model::default();
    model.add(0, work);
    assert_eq!(model.next_attempt(0), 1);
    model.asked((0, 1));
    model.answered((0, 1));
    model
}

fn init(attempt: AttemptId) -> Init {
    Init { pid: 100, attempt }
}

fn is_wrong(model: &Model, text: &str) -> bool {
    model.violations().iter().any(|what| what.contains(text))
}

#[test]
fn a_right_code_is_right_and_another_one_is_not() {
    let mut model = running(BATCH);
    model.exited((0, 1), 3, "");
    assert_eq!((model.violations().len(), model.figures.batch_right), (0, 1));
    let mut model = running(BATCH);
    model.exited((0, 1), 0, "");
    assert!(is_wrong(&model, "ends with 3; WaitTask says 0"), "{:?}", model.violations());
}

#[test]
fn death_by_a_signal_needs_a_fault_or_a_stop() {
    let mut model = running(BATCH);
    model.exited((0, 1), 137, "");
    assert_eq!(model.figures.batch_wrong, 1);
    let mut model = running(BATCH);
    model.hit(&Hit::Attempts(vec![(0, 1)]));
    model.exited((0, 1), 137, "");
    assert_eq!((model.violations().len(), model.figures.batch_hit), (0, 1));
    // A fault that struck another task is no excuse. Neither is a fault that kills, if the exit code is another one.
    let mut model = running(BATCH);
    model.hit(&Hit::Attempts(vec![(1, 1)]));
    model.hit(&Hit::Unsettled);
    model.exited((0, 1), 137, "");
    assert_eq!(model.figures.batch_wrong, 1);
    let mut model = running(Work::Service);
    model.told_to_stop((0, 1));
    model.exited((0, 1), STOPPED, "");
    assert!(model.violations().is_empty());
    // `runc init` ends with 2 if it is stopped before it executes the program. Without a stop, no task ends so.
    for (is_stopped, violations) in [(true, 0), (false, 1)] {
        let mut model = running(Work::Service);
        if is_stopped {
            model.told_to_stop((0, 1));
        }
        model.exited((0, 1), 2, "");
        assert_eq!(model.violations().len(), violations);
    }
    let mut model = running(Work::Service);
    model.hit(&Hit::All);
    model.exited((0, 1), 0, "");
    assert!(is_wrong(&model, "is a service"));
}

#[test]
fn a_task_that_has_just_ended_is_struck_by_the_death_of_its_shim() {
    let mut model = running(BATCH);
    model.hit(&Hit::NotAmong(vec![(0, 1)]));
    model.hit(&Hit::NotAmong(Vec::new()));
    model.exited((0, 1), 137, "");
    assert!(model.violations().is_empty());
}

#[test]
fn a_refusal_must_be_recoverable_and_have_a_cause() {
    for (is_recoverable, fault, wrong) in [(true, true, ""), (true, false, "no fault"), (false, true, "for good")] {
        let mut model = running(Work::Service);
        if fault {
            model.fault_begins(LATER);
        }
        model.refused((0, 1), is_recoverable, "no space", LATER);
        assert_eq!(model.violations().is_empty(), wrong.is_empty());
        assert!(wrong.is_empty() || is_wrong(&model, wrong), "{:?}", model.violations());
    }
    // A fault that was over long ago is no excuse.
    let mut model = running(Work::Service);
    model.fault_begins(Duration::ZERO);
    model.fault_ends(Duration::ZERO);
    model.refused((0, 1), true, "no space", LATER);
    assert!(is_wrong(&model, "no fault"));
}

#[test]
fn a_task_runs_once_or_not_at_all() {
    let mut model = running(Work::Service);
    assert!(model.unrest(Some(&[init((0, 1))])).is_empty());
    assert!(model.unrest(Some(&[])).join("").contains("does not run exactly once"));
    assert!(model.unrest(Some(&[init((0, 1)), init((0, 2))])).join("").contains("does not run exactly once"));
    assert!(model.unrest(Some(&[init((0, 2))])).join("").contains("does not run exactly once"), "another attempt's");
    assert!(model.unrest(None).is_empty(), "what is in a sandbox can't be seen");
    model.seen(&[init((0, 1)), init((0, 2))]);
    assert!(is_wrong(&model, "runs twice"));
    let mut model = running(Work::Service);
    model.unwanted(0);
    assert!(model.unrest(Some(&[])).join("").contains("does not come to its end"));
    model.over(0);
    assert!(model.unrest(Some(&[])).is_empty());
    assert!(model.unrest(Some(&[init((0, 1))])).join("").contains("still alive"));
}

#[test]
fn recovery_may_fail_only_for_what_was_struck() {
    let mut model = running(Work::Service);
    model.lost((0, 1), "its shim is gone");
    assert!(is_wrong(&model, "lost without a cause"));
    let mut model = running(Work::Service);
    model.hit(&Hit::All);
    model.lost((0, 1), "the host was restarted");
    assert!(model.violations().is_empty());
}

#[test]
fn each_start_leaves_one_line() {
    for (calls, text, wrong) in
        [(1, "1\n", false), (1, "", true), (1, "1\n1\n", true), (2, "1\n1\n", false), (1, "1\n2\n", true)]
    {
        let mut model = running(BATCH);
        (1..calls).for_each(|_| model.asked((0, 1)));
        model.witness(0, text);
        assert_eq!(!model.violations().is_empty(), wrong, "{calls} {text:?} {:?}", model.violations());
    }
}

#[test]
fn logs_have_each_line_once() {
    for (text, wrong) in [
        ("tick 0 1 0\ntick 0 1 1\n", false),
        ("tick 0 1 0\n", true),
        ("tick 0 1 1\n", true),
        ("tick 0 1 0\ntick 0 1 0\ntick 0 1 1\n", true),
        ("tick 0 1 1\ntick 0 1 0\n", true),
        // The log has a line of another task, and a line that was cut off in the middle.
        ("tick 5 1 7\ntick 0 1 0\ntick 0 1 1\ntick 0 1", false),
    ] {
        let mut model = running(BATCH);
        model.exited((0, 1), 3, "");
        model.log(0, "tick 0 ", text);
        assert_eq!(!model.violations().is_empty(), wrong, "{text:?} {:?}", model.violations());
    }
}

#[test]
fn a_log_begins_anew_where_a_start_was_undone_and_made_once_more() {
    let mut model = running(BATCH);
    model.asked((0, 1));
    model.exited((0, 1), 3, "");
    model.log(0, "tick 0 ", "tick 0 1 0\ntick 0 1 0\ntick 0 1 1\n");
    assert!(model.violations().is_empty(), "{:?}", model.violations());
    model.log(0, "tick 0 ", "tick 0 1 0\ntick 0 1 0\ntick 0 1 0\ntick 0 1 1\n");
    assert_eq!(model.violations().len(), 1);
}

#[test]
fn commands_may_fail_beside_a_fault_only() {
    let mut model = running(Work::Service);
    model.executed((0, 1), 4, Ok(4), LATER);
    assert_eq!((model.figures.exec_ok, model.violations().len()), (1, 0));
    model.executed((0, 1), 4, Err("gone".to_owned()), LATER);
    assert!(is_wrong(&model, "no fault has caused it"));
    let mut model = running(Work::Service);
    model.fault_begins(LATER);
    model.executed((0, 1), 4, Err("gone".to_owned()), LATER);
    assert_eq!((model.figures.exec_cut, model.violations().len()), (1, 0));
    model.executed((0, 1), 4, Ok(2), LATER);
    assert!(is_wrong(&model, "is said to have ended with 2"), "a code that no fault makes");
}

#[test]
fn what_is_known_is_not_counted() {
    let mut model = Model::ignoring(&["left over".to_owned()]);
    model.violated("left over: mount x".to_owned());
    assert!(model.violations().is_empty());
}
