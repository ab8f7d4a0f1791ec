//! Tables for people.

use super::message::one_line;

/// Rows under a header, in columns as wide as they need. Control characters are escaped: the
/// texts may come from anywhere.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = header.iter().map(|&word| word.to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(&head)
        .chain(rows)
        .map(|row| row.iter().map(|cell| one_line(cell)).collect())
        .collect();
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths);
        let padded: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Names and what there is to say of each, one to a line.
pub(super) fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    let mut text = String::new();
    for (name, value) in facts {
        let name = format!("{name}:");
        text.push_str(&format!("{name:width$}  {}\n", one_line(value)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_at_their_last() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let text = table(
            &["NAME", "STATE"],
            &[row(["é", "running"]), row(["web-1", ""])],
        );
        assert_eq!(text, "NAME   STATE\né      running\nweb-1\n");
        assert_eq!(table(&["NAME"], &[]), "NAME\n");
        assert_eq!(
            table(&["A"], &[vec!["\x1b[2J".to_owned()]]),
            "A\n\\u{1b}[2J\n"
        );
    }

    #[test]
    fn facts_are_aligned() {
        let told = facts(&[("Name", "web".to_owned()), ("Memory", "1G".to_owned())]);
        assert_eq!(told, "Name:    web\nMemory:  1G\n");
    }
}
