//! Tables for people: columns as wide as needed, with two spaces between them.

/// Renders rows in aligned columns below their headings.
pub(crate) fn render(heads: &[&str], rows: &[Vec<String>]) -> String {
    let width = |n: usize| {
        rows.iter()
            .filter_map(|row| row.get(n))
            .map(|cell| cell.chars().count())
            .chain([heads[n].len()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(heads.to_vec());
    for row in rows {
        text.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "long".to_owned()], vec!["bbbb".to_owned(), "x".to_owned()]];
        assert_eq!(super::render(&["ID", "NAME"], &rows), "ID    NAME\na     long\nbbbb  x\n");
    }
}
