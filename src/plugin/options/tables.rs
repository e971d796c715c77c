//! The option tables in Markdown, as docs/options.md has them.

use super::{OptionKind, OptionRow, Presence};

/// Renders a table in Markdown: one line for each option, and the options of a block after the block.
pub(crate) fn table(rows: &[OptionRow]) -> String {
    let mut text = "| option | kind | what |\n| --- | --- | --- |\n".to_owned();
    lines(rows, "", &mut text);
    text
}

fn lines(rows: &[OptionRow], block: &str, text: &mut String) {
    for row in rows {
        let (name, nested) = match row.kind {
            OptionKind::Block(nested) | OptionKind::Blocks(nested) => (row.name.to_owned(), nested),
            OptionKind::Labelled(nested) => (format!("{} \"NAME\"", row.name), nested),
            _ => (row.name.to_owned(), &[][..]),
        };
        let name = if block.is_empty() { name } else { format!("{block} {{ {name} }}") };
        let presence = match row.presence {
            Presence::Required => " **Required.**".to_owned(),
            Presence::Optional => String::new(),
            Presence::Default(value) => format!(" Default: `{value}`."),
        };
        let help = row.help.replace('|', "\\|");
        text.push_str(&format!("| `{name}` | {} | {help}{presence} |\n", kind(row.kind)));
        // No option table has a block inside of a block, whose name would have to show both.
        lines(nested, &name, text);
    }
}

fn kind(kind: OptionKind) -> &'static str {
    match kind {
        OptionKind::Text => "string",
        OptionKind::Flag => "bool",
        OptionKind::Number => "number",
        OptionKind::List => "list of strings",
        OptionKind::Block(_) => "block",
        OptionKind::Blocks(_) => "blocks",
        OptionKind::Labelled(_) => "labelled blocks",
        OptionKind::Map => "map of strings",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::options::{PLUGIN_OPTIONS, TASK_OPTIONS};

    /// `UPDATE_OPTIONS=1 cargo test --locked --lib options_page` writes the tables into docs/options.md.
    #[test]
    fn the_options_page_has_the_tables() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/options.md");
        let before = std::fs::read_to_string(path).expect("the page");
        let mut page = before.clone();
        for (name, rows) in [("job", TASK_OPTIONS), ("agent", PLUGIN_OPTIONS)] {
            let (begin, end) = (format!("<!-- options: {name} -->\n"), format!("<!-- end of options: {name} -->"));
            let from = page.find(&begin).expect("where the table begins") + begin.len();
            let to = page.find(&end).expect("where the table ends");
            if std::env::var_os("UPDATE_OPTIONS").is_some() {
                page.replace_range(from..to, &table(rows));
            } else {
                assert_eq!(
                    page[from..to],
                    table(rows),
                    "UPDATE_OPTIONS=1 cargo test --locked --lib options_page writes the table"
                );
            }
        }
        if page != before {
            std::fs::write(path, page).expect("written");
        }
    }
}
