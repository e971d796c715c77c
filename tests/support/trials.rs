//! Tests of many cases. A case that starts its own plugin is a test of its own (`trials!`). Cases that share a plugin
//! are checked one after the other (`each_case`). Either way, a failure names its case, and the other cases are checked
//! too.

use std::{fmt::Debug, panic::AssertUnwindSafe};

use futures_util::FutureExt as _;

/// The most characters of a case's name.
const NAME_MAX: usize = 160;

/// Makes a test of each case: `trials! { check: name => argument; }` makes a test `name` that calls
/// `check(argument).await`.
#[macro_export]
macro_rules! trials {
    ($check:ident: $($name:ident => $($argument:expr),+;)+) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            $check($($argument),+).await;
        }
    )+};
}

/// Calls `check` with each case. Panics at the end with the cases for which `check` has panicked.
pub(crate) async fn each_case<C: Debug>(cases: impl IntoIterator<Item = C>, mut check: impl AsyncFnMut(C)) {
    let mut failed = Vec::new();
    for case in cases {
        // Some cases consist of a megabyte of text.
        let name: String = format!("{case:?}").chars().take(NAME_MAX).collect();
        if AssertUnwindSafe(check(case)).catch_unwind().await.is_err() {
            eprintln!("failed case: {name}");
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "failed cases: {failed:#?}");
}
