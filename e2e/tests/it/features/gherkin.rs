//! Reads feature files. Of Gherkin it knows what ours use: Feature, Background, Scenario, Scenario Outline with
//! Examples, steps, doc strings and tables (<https://cucumber.io/docs/gherkin/reference>). Any other line is refused
//! by its number. A step may begin with any of the keywords. cucumber itself would bring dozens of
//! crates, and ask for other features of those that the binaries use.

/// Begins with the steps of the background.
pub(super) struct Scenario {
    pub(super) name: String,
    pub(super) steps: Vec<Step>,
}

#[derive(Clone)]
pub(super) struct Step {
    /// The step's line in the file, from 1.
    pub(super) line: usize,
    /// Without its keyword.
    pub(super) text: String,
    pub(super) docstring: Option<String>,
    /// Row by row, each with its cells.
    pub(super) table: Vec<Vec<String>>,
}

impl Step {
    /// With the values of an example in the places that name its columns.
    fn filled(&self, columns: &[String], values: &[String]) -> Self {
        let fill = |text: &String| {
            let values = columns.iter().zip(values);
            values.fold(text.clone(), |text, (column, value)| text.replace(&format!("<{column}>"), value))
        };
        Self {
            line: self.line,
            text: fill(&self.text),
            docstring: self.docstring.as_ref().map(fill),
            table: self.table.iter().map(|row| row.iter().map(fill).collect()).collect(),
        }
    }
}

/// The part of the file that the next lines belong to.
enum Place {
    /// Before the first step: the feature's description.
    Description,
    Background,
    Scenario,
    Examples,
}

pub(super) fn scenarios(feature: &str) -> Vec<Scenario> {
    let mut place = Place::Description;
    let mut background: Vec<Step> = Vec::new();
    let mut found: Vec<Scenario> = Vec::new();
    let mut outline = false;
    let mut examples: Vec<Vec<String>> = Vec::new();
    let mut lines = feature.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
    while let Some((number, line)) = lines.next() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix("Scenario:").or_else(|| line.strip_prefix("Scenario Outline:")) {
            fill_in(&mut found, outline, std::mem::take(&mut examples));
            outline = line.starts_with("Scenario Outline:");
            place = Place::Scenario;
            found.push(Scenario { name: name.trim().to_owned(), steps: background.clone() });
            continue;
        }
        let steps = match place {
            Place::Description if line == "Background:" => {
                place = Place::Background;
                continue;
            }
            Place::Description => {
                let is_text = keyword_removed(line).is_none() && !line.starts_with('@') && !line.ends_with(':');
                assert!(is_text || line.starts_with("Feature:"), "line {number}: not a description: {line}");
                continue;
            }
            Place::Background => Some(&mut background),
            Place::Scenario if outline && line == "Examples:" => {
                place = Place::Examples;
                continue;
            }
            Place::Scenario => found.last_mut().map(|scenario| &mut scenario.steps),
            Place::Examples => {
                examples.push(cells(line).unwrap_or_else(|| panic!("line {number}: not a row of examples: {line}")));
                continue;
            }
        };
        let steps = steps.expect("a scenario has begun");
        if let Some(text) = keyword_removed(line) {
            steps.push(Step { line: number, text: text.to_owned(), docstring: None, table: Vec::new() });
            continue;
        }
        let step = steps.last_mut().unwrap_or_else(|| panic!("line {number}: no step before {line}"));
        if line == "\"\"\"" {
            let mut text = Vec::new();
            loop {
                let (_, line) = lines.next().unwrap_or_else(|| panic!("line {number}: a doc string without an end"));
                if line == "\"\"\"" {
                    break;
                }
                text.push(line);
            }
            step.docstring = Some(text.join("\n"));
        } else if let Some(row) = cells(line) {
            step.table.push(row);
        } else {
            panic!("line {number}: neither a step nor a part of one: {line}");
        }
    }
    fill_in(&mut found, outline, examples);
    found
}

/// Puts a scenario for each example in the place of the last one that was found, if that is an outline.
fn fill_in(found: &mut Vec<Scenario>, is_outline: bool, examples: Vec<Vec<String>>) {
    if !is_outline {
        return;
    }
    let outline = found.pop().expect("an outline");
    let Some((columns, rows @ [_, ..])) = examples.split_first() else { panic!("{} has no example", outline.name) };
    found.extend(rows.iter().map(|row| {
        assert_eq!(row.len(), columns.len(), "the examples of {}", outline.name);
        let steps = outline.steps.iter().map(|step| step.filled(columns, row)).collect();
        Scenario { name: format!("{} ({})", outline.name, row.join(", ")), steps }
    }));
}

fn keyword_removed(line: &str) -> Option<&str> {
    ["Given ", "When ", "Then ", "And ", "But "].iter().find_map(|keyword| line.strip_prefix(keyword)).map(str::trim)
}

fn cells(line: &str) -> Option<Vec<String>> {
    let inner = line.strip_prefix('|')?.strip_suffix('|')?;
    Some(inner.split('|').map(|cell| cell.trim().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_feature_file_is_read() {
        let feature = r#"
            Feature: Loans
              Words that describe it.

              Background:
                Given a library

              Scenario: A loan
                When somebody asks
                  """
                  {"book": 1}
                  """
                Then the history is
                  | version | to    |
                  | 1       | asked |

              # A remark.
              Scenario Outline: A wrong one
                When somebody asks for "<book>"
                But not <order>

                Examples:
                  | book |
                  | none |
                  | two  |
        "#;
        let scenarios = scenarios(feature);
        let names: Vec<_> = scenarios.iter().map(|scenario| scenario.name.as_str()).collect();
        assert_eq!(names, ["A loan", "A wrong one (none)", "A wrong one (two)"]);
        let loan: Vec<_> = scenarios[0].steps.iter().map(|step| (step.line, step.text.as_str())).collect();
        assert_eq!(loan, [(6, "a library"), (9, "somebody asks"), (13, "the history is")]);
        assert_eq!(scenarios[0].steps[1].docstring.as_deref(), Some(r#"{"book": 1}"#));
        assert_eq!(scenarios[0].steps[2].table, [["version", "to"], ["1", "asked"]]);
        let wrong: Vec<_> = scenarios[2].steps.iter().map(|step| step.text.as_str()).collect();
        assert_eq!(wrong, ["a library", r#"somebody asks for "two""#, "not <order>"]);
    }

    #[test]
    #[should_panic(expected = "line 3: neither a step nor a part of one: Whenever")]
    fn a_line_that_it_does_not_know_is_named() {
        scenarios("Scenario: One\nWhen it rains\nWhenever");
    }
}
