//! Finds a shorter history that still fails, by delta debugging over the list of steps. It does no I/O; the caller
//! plays the steps.

/// Looks for a shorter list of `indexes` for which `fails` holds, in at most `replays` tries.
///
/// The algorithm is ddmin (Zeller and Hildebrandt: Simplifying and isolating failure-inducing input, 2002). It first
/// tries to keep only one part of the list and then to leave one part out, with ever smaller parts.
pub(crate) async fn shortest(
    indexes: Vec<usize>,
    mut replays: usize,
    mut fails: impl AsyncFnMut(&[usize]) -> bool,
) -> Vec<usize> {
    let mut known = indexes;
    let mut parts = 2;
    while known.len() > 1 && replays > 0 {
        let size = known.len().div_ceil(parts);
        let pieces: Vec<&[usize]> = known.chunks(size).collect();
        // A failed history has failed at its end, so its last part is tried first.
        let kept = pieces.iter().rev().map(|piece| piece.to_vec());
        let left_out = (0..pieces.len()).map(|out| {
            let rest = pieces.iter().enumerate().filter(|(index, _)| *index != out);
            rest.flat_map(|(_, piece)| piece.iter().copied()).collect()
        });
        // With two parts, keeping one is the same as leaving out the other.
        let candidates: Vec<Vec<usize>> = if parts == 2 { kept.collect() } else { left_out.collect() };
        let mut found = None;
        for candidate in candidates.into_iter().filter(|candidate| candidate.len() < known.len()) {
            if replays == 0 {
                break;
            }
            replays -= 1;
            if fails(&candidate).await {
                found = Some(candidate);
                break;
            }
        }
        match found {
            Some(shorter) => {
                known = shorter;
                parts = (parts - 1).max(2);
            }
            None if parts >= known.len() => break,
            None => parts = (parts * 2).min(known.len()),
        }
    }
    known
}

#[tokio::test]
async fn what_matters_is_found() {
    let needs = |wanted: &'static [usize]| move |steps: &[usize]| wanted.iter().all(|index| steps.contains(index));
    for wanted in [&[3][..], &[0, 99], &[10, 11, 50]] {
        let check = needs(wanted);
        let found = shortest((0..100).collect(), 1000, async |steps: &[usize]| check(steps)).await;
        assert_eq!(found, wanted);
    }
}

#[tokio::test]
async fn the_number_of_replays_is_bounded_and_what_is_found_still_fails() {
    let mut tries = 0;
    let found = shortest((0..100).collect(), 5, async |steps: &[usize]| {
        tries += 1;
        steps.contains(&7) && steps.contains(&93)
    })
    .await;
    assert!(tries <= 5 && found.contains(&7) && found.contains(&93), "{tries} {found:?}");
    assert_eq!(shortest(vec![4], 9, async |_: &[usize]| true).await, [4], "one step can't become fewer");
}
