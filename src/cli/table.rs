pub(super) use crate::printable::printable;

/// Rows under a heading, each column as wide as its widest cell.
pub(super) struct Table<const COLUMNS: usize> {
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    pub(super) fn new(heading: [&str; COLUMNS]) -> Self {
        Table { rows: vec![heading.map(str::to_owned)] }
    }

    pub(super) fn push(&mut self, row: [String; COLUMNS]) {
        self.rows.push(row.map(|cell| if cell.is_empty() { "-".to_owned() } else { printable(&cell) }));
    }

    /// The table as lines, two spaces between columns and none at the end of a line.
    pub(super) fn render(&self) -> String {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; COLUMNS] = std::array::from_fn(width);
        let mut text = String::new();
        for row in &self.rows {
            let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_empty_cells_are_dashes() {
        let mut table = Table::new(["A", "LONG", "C"]);
        table.push(["wide cell".into(), "ü".into(), String::new()]);
        table.push(["x".into(), String::new(), "end".into()]);
        assert_eq!(table.render(), "A          LONG  C\nwide cell  ü     -\nx          -     end\n");
    }

    #[test]
    fn no_cell_reaches_the_terminal_as_a_command() {
        let mut table = Table::new(["NAME"]);
        table.push(["a\u{1b}[2Jb\nc\u{9b}".into()]);
        assert_eq!(table.render(), "NAME\na?[2Jb?c?\n");
    }
}
