//! The table of differences on the page docs/compatibility.md.

use std::{collections::HashSet, fs};

use libtest_mimic::Failed;

use crate::{
    cases,
    differences::{DIFFERENCES, Difference},
};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/compatibility.md");
const BEGIN: &str = "<!-- differences -->\n";
const END: &str = "<!-- end of differences -->";

/// Checks that the page has the rows of [`DIFFERENCES`], and that their lines name cases that exist.
/// `UPDATE_DIFFERENCES=1 cargo test --test compat page` writes the rows.
pub(crate) fn has_the_same_differences() -> Result<(), Failed> {
    let names: HashSet<&str> = cases::cases().iter().map(|case| case.name).collect();
    let used = DIFFERENCES.iter().flat_map(|difference| difference.lines).flat_map(|line| line.cases);
    if let Some(unknown) = used.into_iter().find(|case| !names.contains(*case)) {
        return Err(Failed::from(format!("there is no case {unknown:?}")));
    }
    let page = fs::read_to_string(PAGE).unwrap();
    let from = page.find(BEGIN).ok_or("the page has no place for the differences")? + BEGIN.len();
    let to = page.find(END).ok_or("the page has no end of the differences")?;
    if page[from..to] == table() {
        return Ok(());
    }
    if std::env::var_os("UPDATE_DIFFERENCES").is_some() {
        fs::write(PAGE, format!("{}{}{}", &page[..from], table(), &page[to..])).unwrap();
        return Ok(());
    }
    Err(Failed::from("UPDATE_DIFFERENCES=1 cargo test --test compat page writes the rows into docs/compatibility.md"))
}

fn table() -> String {
    let head = "| what | docker | this driver | reason |\n| --- | --- | --- | --- |\n";
    DIFFERENCES.iter().fold(head.to_owned(), |table, difference| {
        let Difference { what, docker, driver, reason, .. } = difference;
        let (docker, reason) = match difference.current {
            Some(source) => {
                (format!("{docker} (docker 20.10)"), format!("{reason} Current docker does the same: {source}."))
            }
            None => ((*docker).to_owned(), (*reason).to_owned()),
        };
        format!("{table}| {what} | {docker} | {driver} | {reason} |\n")
    })
}
