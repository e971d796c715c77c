//! Breaks each rule of the model once.

use super::*;

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn view(state: &str, events: &[(u64, Kind)]) -> AllocView {
    let events = events.iter().map(|(then, kind)| Event { nanos: *then, then: at(*then), kind: kind.clone() });
    let status = if state == "dead" { "failed" } else { "running" };
    AllocView {
        id: "a".to_owned(),
        status: status.to_owned(),
        why: String::new(),
        state: state.to_owned(),
        is_failed: state == "dead",
        events: events.collect(),
    }
}

fn with(work: Work) -> Model {
    let mut model = Model::default();
    model.add(0, work);
    model
}

const BATCH: Work = Work::Batch { code: 3, lines: 2, pause_ms: 0 };

#[test]
fn an_exit_code_is_the_one_written_or_137_after_a_hit() {
    for (code, is_hit, is_right) in [(3, false, true), (4, true, false), (137, true, true), (137, false, false)] {
        let mut model = with(BATCH);
        if is_hit {
            model.hit(&Hit::Attempts(vec![(0, 1)]), at(1));
        }
        model.told(0, &view("dead", &[(1, Kind::Started), (2, Kind::Terminated(code))]));
        assert_eq!(model.violations().is_empty(), is_right, "{code} {is_hit}: {:?}", model.violations());
    }
}

#[test]
fn a_refusal_needs_a_fault_and_is_never_final() {
    let refused = |state: &str, message: &str| view(state, &[(5, Kind::DriverFailure(message.to_owned()))]);
    let mut model = with(Work::Service);
    model.told(0, &refused("pending", "no space"));
    assert!(model.violations()[0].contains("no fault has caused it"), "{:?}", model.violations());
    let mut model = with(Work::Service);
    model.fault_begins(at(4));
    model.told(0, &refused("pending", "no space"));
    assert!(model.violations().is_empty(), "{:?}", model.violations());
    model.told(0, &refused("dead", "no space"));
    assert!(model.violations()[0].contains("given up task 0 for good"), "{:?}", model.violations());
    // The second start must have its own cause to fail.
    for is_struck in [false, true] {
        let mut model = with(Work::Service);
        model.plugin_died(at(4));
        model.fault_begins(at(4));
        model.fault_ends(at(4));
        if is_struck {
            model.struck_at_start(at(5));
        }
        model.told(0, &refused("dead", NOMAD_GIVES_UP[0]));
        assert_eq!(model.violations().is_empty(), is_struck, "{:?}", model.violations());
        assert_eq!(model.given_up, u32::from(is_struck));
    }
    for work in [Work::Service, BATCH] {
        let mut model = with(work);
        model.told(0, &AllocView { why: format!("{NOT_ADDED}: plugin is shut down"), ..view("dead", &[]) });
        model.outcome(0);
        assert!(model.violations().is_empty() && model.given_up == 1, "{:?}", model.violations());
    }
}

#[test]
fn a_lost_connection_needs_a_death() {
    for is_dead in [false, true] {
        let mut model = with(Work::Service);
        if is_dead {
            model.plugin_died(at(1));
        }
        model.told(0, &view("pending", &[(1, Kind::Started), (2, Kind::Disconnected("EOF".to_owned()))]));
        assert_eq!(model.violations().is_empty(), is_dead, "{:?}", model.violations());
    }
}

#[test]
fn a_loss_needs_a_hit() {
    let lost = view("pending", &[(1, Kind::Started), (2, Kind::Restarting)]);
    let mut model = with(Work::Service);
    model.told(0, &lost);
    assert!(model.violations()[0].contains("lost without a cause"), "{:?}", model.violations());
    let mut model = with(Work::Service);
    model.hit(&Hit::All, at(1));
    model.told(0, &lost);
    assert!(model.violations().is_empty(), "{:?}", model.violations());
    // One death of a plugin is no excuse for a lost task, two deaths may be.
    for (deaths, is_right) in [(&[1][..], false), (&[1, 2], true), (&[1, 20], false)] {
        let mut model = with(Work::Service);
        deaths.iter().for_each(|death| model.plugin_died(at(*death)));
        model.told(0, &lost);
        assert_eq!(model.violations().is_empty(), is_right, "{deaths:?}: {:?}", model.violations());
        assert_eq!(model.let_go, u32::from(is_right));
    }
}

#[test]
fn two_living_containers_are_seen_and_a_service_that_does_not_run_is_unrest() {
    let mut model = with(Work::Service);
    let init = |pid| Init { pid, attempt: (0, 1) };
    assert!(model.unrest(&[])[0].contains("does not run exactly once"));
    model.told(0, &view("running", &[(1, Kind::Started)]));
    assert!(model.unrest(&[init(7)]).is_empty());
    model.seen(&[init(7), init(8)]);
    assert!(model.violations()[0].contains("runs twice"));
}

#[test]
fn starts_and_lines_are_counted() {
    let mut model = with(BATCH);
    model.told(0, &view("dead", &[(1, Kind::Started), (2, Kind::Terminated(3))]));
    model.witness(0, "1\n");
    assert!(model.log_faults(0, "tick 0 1 0\ntick 0 1 1\n", true).is_empty());
    assert!(model.log_faults(0, "tick 0 1 0\n", true)[0].contains("1 of 2 lines"));
    model.plugin_died(at(1));
    assert!(model.log_faults(0, "", true)[0].contains("0 of 2 lines"), "the death of a plugin costs no line");
    model.struck_at_start(at(1));
    assert!(model.log_faults(0, "", true).is_empty(), "nobody may read what a start that was made once more writes");
    assert!(model.log_faults(0, "tick 0 1 1\n", false)[0].contains("where 0 is due"));
    assert!(model.log_faults(0, "tick 0 1 0\ntick 0 1 0\n", false)[0].contains("where 1 is due"));
    assert!(model.violations().is_empty());
    model.witness(0, "1\n2\n");
    assert!(model.violations()[0].contains("has run 2 times"), "{:?}", model.violations());
}

#[test]
fn lines_may_change_places_only_after_the_death_of_an_agent() {
    let mut model = with(Work::Service);
    let (swapped, double) = ("tick 0 1 1\ntick 0 1 0\n", "tick 0 1 1\ntick 0 1 0\ntick 0 1 0\n");
    assert_eq!(model.log_faults(0, swapped, false).len(), 2);
    model.agent_died();
    assert!(model.log_faults(0, swapped, false).is_empty());
    assert!(!model.log_faults(0, double, false).is_empty());
}

#[test]
fn a_batch_task_that_is_over_has_told_how() {
    for (events, is_right) in [
        (vec![(1, Kind::Started), (2, Kind::Terminated(3))], true),
        (vec![(2, Kind::DriverFailure("no space".to_owned())), (3, Kind::NotRestarting)], true),
        (vec![(1, Kind::Started)], false),
    ] {
        let mut model = with(BATCH);
        model.fault_begins(at(1));
        model.told(0, &view("dead", &events));
        model.outcome(0);
        assert_eq!(model.violations().is_empty(), is_right, "{events:?}: {:?}", model.violations());
    }
}
