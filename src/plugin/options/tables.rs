//! The option tables in Markdown, as docs/options.md has them.

use super::{Kind, Presence, Row};

/// Renders a table in Markdown: one line for each option, and the options of a block after the block.
pub fn table(rows: &[Row]) -> String {
    let mut text = "| option | kind | what |\n| --- | --- | --- |\n".to_owned();
    lines(rows, "", &mut text);
    text
}

fn lines(rows: &[Row], block: &str, text: &mut String) {
    for row in rows {
        let (name, nested) = match row.kind {
            Kind::Block(nested) | Kind::Blocks(nested) => (row.name.to_owned(), nested),
            Kind::Labelled(nested) => (format!("{} \"NAME\"", row.name), nested),
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

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Text => "string",
        Kind::Flag => "bool",
        Kind::Number => "number",
        Kind::List => "list of strings",
        Kind::Block(_) => "block",
        Kind::Blocks(_) => "blocks",
        Kind::Labelled(_) => "labelled blocks",
        Kind::Map => "map of strings",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::options::{PLUGIN, TASK};

    /// `UPDATE_OPTIONS=1 cargo test options_page` writes the tables into docs/options.md.
    #[test]
    fn the_options_page_has_the_tables() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/options.md");
        let before = std::fs::read_to_string(path).expect("the page");
        let mut page = before.clone();
        for (name, rows) in [("job", TASK), ("agent", PLUGIN)] {
            let (begin, end) = (format!("<!-- options: {name} -->\n"), format!("<!-- end of options: {name} -->"));
            let from = page.find(&begin).expect("where the table begins") + begin.len();
            let to = page.find(&end).expect("where the table ends");
            if std::env::var_os("UPDATE_OPTIONS").is_some() {
                page.replace_range(from..to, &table(rows));
            } else {
                assert_eq!(page[from..to], table(rows), "UPDATE_OPTIONS=1 cargo test options_page writes the table");
            }
        }
        if page != before {
            std::fs::write(path, page).expect("written");
        }
    }
}
