//! Rows of text as a Markdown table whose columns also line up in a terminal.

/// The first column is a label and stands left, the others are figures and stand right.
pub fn markdown(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|title| title.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let header: Vec<String> = header.iter().map(|title| (*title).to_owned()).collect();
    let mut out = line(&header, &widths);
    out.push('|');
    for (column, width) in widths.iter().enumerate() {
        let dashes = "-".repeat(*width);
        out.push_str(&if column == 0 { format!(" {dashes} |") } else { format!(" {dashes}:|") });
    }
    out.push('\n');
    for row in rows {
        out.push_str(&line(row, &widths));
    }
    out
}

fn line(cells: &[String], widths: &[usize]) -> String {
    let mut out = String::from("|");
    for (column, (cell, &width)) in cells.iter().zip(widths).enumerate() {
        out.push_str(&if column == 0 { format!(" {cell:<width$} |") } else { format!(" {cell:>width$} |") });
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_stands_in_them() {
        let rows = vec![vec!["1".to_owned(), "12,345".to_owned()], vec!["512".to_owned(), "–".to_owned()]];
        let expected = "\
| callers |    p50 |
| ------- | ------:|
| 1       | 12,345 |
| 512     |      – |
";
        assert_eq!(markdown(&["callers", "p50"], &rows), expected);
    }
}
