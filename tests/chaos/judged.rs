//! Plays a list of steps. A failure is reported with its history and with the shortest history that was found to fail.

use std::fmt::Display;

use crate::{report::Figures, shrink, world::Outcome};

/// Plays `steps`, or only those whose numbers are in `keep`. `words` are the arguments that play them again.
///
/// # Errors
/// When the run has failed. The error holds the shortest history; the full report of the failure is printed before.
pub(crate) async fn judged<S: Copy + Display>(
    words: &str,
    steps: &[S],
    keep: Option<&[usize]>,
    replays: usize,
    play: impl AsyncFn(&[S]) -> Outcome,
) -> Result<Figures, String> {
    let chosen: Vec<usize> = keep.map_or_else(|| (0..steps.len()).collect(), <[usize]>::to_vec);
    let of = |indexes: &[usize]| indexes.iter().filter_map(|index| steps.get(*index)).copied().collect::<Vec<_>>();
    let outcome = play(&of(&chosen)).await;
    if outcome.violations.is_empty() {
        return Ok(outcome.figures);
    }
    let faults: u32 = outcome.figures.faults.values().sum();
    let text = format!(
        "{words} fails after {faults} faults:\n  {}\nthe plugins' last warnings:\n  {}\nhistory:\n  {}\n",
        outcome.violations.join("\n  "),
        outcome.warnings.join("\n  "),
        outcome.history.join("\n  ")
    );
    // The report is printed at once, because the search for a shorter history may take long.
    eprintln!("{text}");
    // Steps after the failure were not played, so they are left out.
    let played = outcome.history.iter().filter(|line| line.contains(" step ")).count();
    let shortest = shrink::shortest(chosen[..played].to_vec(), replays, async |indexes: &[usize]| {
        let outcome = play(&of(indexes)).await;
        eprintln!("{} steps of them: {:?}", indexes.len(), outcome.violations);
        !outcome.violations.is_empty()
    })
    .await;
    let mut text = format!("the shortest history that was found to fail ({} steps):\n", shortest.len());
    for index in &shortest {
        text.push_str(&format!("  {index}: {}\n", steps[*index]));
    }
    let numbers: Vec<String> = shortest.iter().map(ToString::to_string).collect();
    text.push_str(&format!("again: make chaos ARGS=\"{words} --keep {}\"\n", numbers.join(",")));
    Err(text)
}
