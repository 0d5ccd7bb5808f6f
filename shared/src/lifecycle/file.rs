//! The file of a lifecycle: its shape, and every check that lets the rest of the code trust it.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Deserialize;

use super::{
    Content, Lifecycle, Need, Receive, Requires, State, Timeout, Transition,
    template::{Emit, Template},
};
use crate::{order::DELETED, settings};

/// All that is wrong with one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadFile {
    pub file: String,
    pub flaws: Vec<Flaw>,
}

/// One thing that is wrong: where, what, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    pub key: String,
    pub problem: String,
    pub remedy: String,
}

impl fmt::Display for BadFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Flaw { key, problem, remedy }) in self.flaws.iter().enumerate() {
            let newline = if index > 0 { "\n" } else { "" };
            write!(f, "{newline}{}: {key}: {problem}; {remedy}", self.file)?;
        }
        Ok(())
    }
}

impl std::error::Error for BadFile {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    initial: String,
    #[serde(default)]
    requires: RawRequires,
    states: BTreeMap<String, RawState>,
    content: Option<RawContent>,
    #[serde(default)]
    transitions: Vec<RawTransition>,
    #[serde(default)]
    timeouts: Vec<RawTimeout>,
    #[serde(default)]
    receives: Vec<RawReceive>,
    #[serde(default)]
    emits: Vec<RawEmit>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRequires {
    #[serde(default)]
    user_id: Need,
    #[serde(default)]
    amount: Need,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawState {
    #[serde(default)]
    terminal: bool,
    #[serde(default)]
    cancel: bool,
    code: Option<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawContent {
    #[serde(default)]
    change_in: Vec<String>,
    leads_to: Option<String>,
    on_handled: Option<String>,
    on_refused: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTransition {
    from: Vec<String>,
    to: String,
    #[serde(default)]
    on: Vec<String>,
    #[serde(default)]
    by_hand: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTimeout {
    r#in: String,
    after: String,
    trigger: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawReceive {
    topic: String,
    order_id: String,
    trigger: String,
    triggers: BTreeMap<String, String>,
    message_id: Option<String>,
    user_id: Option<String>,
    reason: Option<String>,
    #[serde(default)]
    creates_on: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEmit {
    entering: Option<String>,
    #[serde(default)]
    on_change: bool,
    topic: String,
    key: Option<toml::Value>,
    body: toml::Value,
}

/// Values of `${NAME:-default}` in `topic` and `after`.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads and checks one file; `file` is its name in errors.
///
/// # Errors
/// All that is wrong with it.
pub fn read(file: &str, text: &str, variables: Variables<'_>) -> Result<Lifecycle, BadFile> {
    let raw: File = toml::from_str(text).map_err(|error| bad_toml(file, text, &error))?;
    if raw.states.len() > MAX_STATES || raw.transitions.len() > MAX_TRANSITIONS {
        let flaw = Flaw {
            key: "states".to_owned(),
            problem: format!("{} of them, and {} transitions", raw.states.len(), raw.transitions.len()),
            remedy: format!("make do with {MAX_STATES} and {MAX_TRANSITIONS}"),
        };
        return Err(BadFile { file: file.to_owned(), flaws: vec![flaw] });
    }
    let mut check = Check { states: &raw.states, triggers: triggers(&raw), variables, flaws: Vec::new() };
    let lifecycle = check.lifecycle(&raw);
    if check.flaws.is_empty() { Ok(lifecycle) } else { Err(BadFile { file: file.to_owned(), flaws: check.flaws }) }
}

fn bad_toml(file: &str, text: &str, error: &toml::de::Error) -> BadFile {
    let line = error.span().map(|span| text[..span.start.min(text.len())].lines().count().max(1));
    let key = match line {
        Some(line) => format!("line {line}"),
        None => "file".to_owned(),
    };
    let remedy = "correct it; the README shows a whole file, and every key there is".to_owned();
    BadFile { file: file.to_owned(), flaws: vec![Flaw { key, problem: error.message().to_owned(), remedy }] }
}

/// Triggers that something fires.
fn triggers(raw: &File) -> Vec<String> {
    let received = raw.receives.iter().flat_map(|receive| receive.triggers.values());
    let timed = raw.timeouts.iter().map(|timeout| &timeout.trigger);
    let content = raw.content.iter().flat_map(|content| content.on_handled.iter().chain(&content.on_refused));
    received.chain(timed).chain(content).cloned().collect()
}

/// Collects every flaw, not just the first.
struct Check<'a> {
    states: &'a BTreeMap<String, RawState>,
    triggers: Vec<String>,
    variables: Variables<'a>,
    flaws: Vec<Flaw>,
}

impl Check<'_> {
    fn flaw(&mut self, key: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) {
        self.flaws.push(Flaw { key: key.into(), problem: problem.into(), remedy: remedy.into() });
    }

    fn lifecycle(&mut self, raw: &File) -> Lifecycle {
        if !is_name(&raw.name) {
            self.flaw("name", format!("\"{}\" is no name", raw.name), "use up to 64 letters, digits, - and _");
        }
        self.states(raw);
        self.state("initial", &raw.initial);
        let lifecycle = Lifecycle {
            name: raw.name.clone(),
            initial: raw.initial.clone(),
            requires: Requires { user_id: raw.requires.user_id, amount: raw.requires.amount },
            content: self.content(raw),
            states: raw
                .states
                .iter()
                .map(|(name, state)| State {
                    name: name.clone(),
                    terminal: state.terminal,
                    cancel: state.cancel,
                    code: state.code,
                })
                .collect(),
            transitions: self.transitions(raw),
            timeouts: self.timeouts(raw),
            receives: raw
                .receives
                .iter()
                .enumerate()
                .map(|(index, receive)| self.receive(index, receive, raw))
                .collect(),
            emits: raw.emits.iter().enumerate().filter_map(|(index, raw)| self.emit(index, raw)).collect(),
        };
        self.reach(raw, &lifecycle);
        lifecycle
    }

    fn states(&mut self, raw: &File) {
        if raw.states.is_empty() {
            self.flaw("states", "there are none", "declare each state: [states] and below it NAME = {}");
        }
        let mut codes = BTreeMap::new();
        for (name, state) in &raw.states {
            let key = format!("states.{name}");
            if name == DELETED {
                self.flaw(&key, "exists in every lifecycle", "leave it out");
            } else if !is_name(name) {
                self.flaw(&key, "is no name of a state", "use up to 64 letters, digits, - and _");
            }
            if let Some(code) = state.code
                && let Some(other) = codes.insert(code, name)
            {
                self.flaw(format!("{key}.code"), format!("{code} is {other}'s already"), "give each state its own");
            }
        }
    }

    /// Is this one of the states?
    fn state(&mut self, key: &str, name: &str) {
        if !self.states.contains_key(name) {
            let states = self.states.keys().cloned().collect::<Vec<_>>().join(", ");
            self.flaw(
                key,
                format!("\"{name}\" is no state"),
                format!("declare it under [states], or use one of {states}"),
            );
        }
    }

    fn content(&mut self, raw: &File) -> Content {
        let Some(content) = &raw.content else {
            return Content { leads_to: raw.initial.clone(), ..Content::default() };
        };
        for (index, name) in content.change_in.iter().enumerate() {
            self.state(&format!("content.change_in[{index}]"), name);
        }
        if let Some(name) = &content.leads_to {
            self.state("content.leads_to", name);
        }
        for (key, trigger) in [("content.on_handled", &content.on_handled), ("content.on_refused", &content.on_refused)]
        {
            if let Some(trigger) = trigger {
                self.has_transition(key, trigger, raw);
            }
        }
        Content {
            change_in: content.change_in.clone(),
            leads_to: content.leads_to.clone().unwrap_or_else(|| raw.initial.clone()),
            on_handled: content.on_handled.clone(),
            on_refused: content.on_refused.clone(),
        }
    }

    /// Does some transition happen on this trigger?
    fn has_transition(&mut self, key: &str, trigger: &str, raw: &File) {
        if !raw.transitions.iter().any(|way| way.on.iter().any(|on| on == trigger)) {
            self.flaw(
                key,
                format!("no transition happens on \"{trigger}\""),
                format!("add it to the `on` of a transition: on = [\"{trigger}\"]"),
            );
        }
    }

    fn transitions(&mut self, raw: &File) -> Vec<Transition> {
        let mut taken: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for (index, way) in raw.transitions.iter().enumerate() {
            let key = format!("transitions[{index}]");
            if way.from.is_empty() {
                self.flaw(format!("{key}.from"), "is empty", "name the states that it leaves");
            }
            if way.on.is_empty() && !way.by_hand {
                self.flaw(&key, "nothing makes it happen", "give it triggers (on = [\"…\"]) or by_hand = true");
            }
            self.state(&format!("{key}.to"), &way.to);
            for from in &way.from {
                self.state(&format!("{key}.from"), from);
                if self.states.get(from).is_some_and(|state| state.terminal) {
                    self.flaw(
                        format!("{key}.from"),
                        format!("{from} is terminal, and nothing leaves a terminal state"),
                        format!("take {from} out, or `terminal` off states.{from}"),
                    );
                }
                if *from == way.to {
                    self.flaw(format!("{key}.to"), format!("{from} leads to itself"), "take it out of `from`");
                }
                for on in &way.on {
                    if let Some(other) = taken.insert((from, on), index) {
                        self.flaw(
                            format!("{key}.on"),
                            format!("\"{on}\" leaves {from} by transitions[{other}] already"),
                            "let a trigger lead from a state to one other",
                        );
                    }
                }
            }
            for on in &way.on {
                if !self.triggers.contains(on) {
                    self.flaw(
                        format!("{key}.on"),
                        format!("nothing fires \"{on}\""),
                        "name it in receives.triggers, timeouts.trigger or content.on_handled, or take it out",
                    );
                }
            }
        }
        self.one_way_to_cancel(raw);
        let clone = |way: &RawTransition| Transition {
            from: way.from.clone(),
            to: way.to.clone(),
            on: way.on.clone(),
            by_hand: way.by_hand,
        };
        raw.transitions.iter().map(clone).collect()
    }

    fn one_way_to_cancel(&mut self, raw: &File) {
        let is_cancel = |name: &str| raw.states.get(name).is_some_and(|state| state.cancel);
        for from in raw.states.keys() {
            let ways: Vec<_> = raw
                .transitions
                .iter()
                .filter(|way| way.by_hand && is_cancel(&way.to) && way.from.contains(from))
                .map(|way| way.to.as_str())
                .collect();
            if let [first, second, ..] = ways.as_slice() {
                self.flaw(
                    "transitions",
                    format!("to cancel from {from} could lead to {first} or to {second}"),
                    "let one transition by hand lead from a state to a state with `cancel`",
                );
            }
        }
    }

    fn timeouts(&mut self, raw: &File) -> Vec<Timeout> {
        let mut timeouts: Vec<Timeout> = Vec::new();
        for (index, timeout) in raw.timeouts.iter().enumerate() {
            let key = format!("timeouts[{index}]");
            let state = &timeout.r#in;
            self.state(&format!("{key}.in"), state);
            if timeouts.iter().any(|other| other.state == *state) {
                self.flaw(format!("{key}.in"), format!("{state} has a timeout already"), "keep one of the two");
            }
            let legal = |way: &RawTransition| way.from.contains(state) && way.on.contains(&timeout.trigger);
            if !raw.transitions.iter().any(legal) {
                self.flaw(
                    format!("{key}.trigger"),
                    format!("\"{}\" leads nowhere from {state}", timeout.trigger),
                    format!("add a transition: from = [\"{state}\"], on = [\"{}\"]", timeout.trigger),
                );
            }
            let after = self.expand(&format!("{key}.after"), &timeout.after);
            let after = match after.as_str() {
                "off" => None,
                text => match humantime::parse_duration(text) {
                    Ok(after) if after > Duration::ZERO && after < MAX_TIMEOUT => Some(after),
                    _ => {
                        self.flaw(
                            format!("{key}.after"),
                            format!("{} is no time to wait", named(&timeout.after, text)),
                            "write 30s, 15m, 2h or 3days, or off",
                        );
                        None
                    }
                },
            };
            timeouts.push(Timeout { state: state.clone(), after, trigger: timeout.trigger.clone() });
        }
        timeouts
    }

    fn receive(&mut self, index: usize, raw: &RawReceive, file: &File) -> Receive {
        let key = format!("receives[{index}]");
        let topic = self.topic(&format!("{key}.topic"), &raw.topic);
        let places = [
            ("order_id", Some(&raw.order_id)),
            ("trigger", Some(&raw.trigger)),
            ("message_id", raw.message_id.as_ref()),
            ("user_id", raw.user_id.as_ref()),
            ("reason", raw.reason.as_ref()),
        ];
        for (name, pointer) in places {
            if pointer.is_some_and(|pointer| !pointer.starts_with('/')) {
                self.flaw(
                    format!("{key}.{name}"),
                    format!("\"{}\" is no JSON pointer", pointer.map_or("", String::as_str)),
                    "begin with a slash: \"/order_id\", \"/order/id\"",
                );
            }
        }
        if raw.triggers.is_empty() {
            self.flaw(
                format!("{key}.triggers"),
                "is empty",
                "say which value fires what: triggers = { success = \"paid\" }",
            );
        }
        for trigger in &raw.creates_on {
            let leaves = |way: &RawTransition| way.from.contains(&file.initial) && way.on.contains(trigger);
            if !file.transitions.iter().any(leaves) {
                self.flaw(
                    format!("{key}.creates_on"),
                    format!("\"{trigger}\" does not leave {}, where the order would begin", file.initial),
                    format!("add a transition: from = [\"{}\"], on = [\"{trigger}\"]", file.initial),
                );
            }
            if !raw.triggers.values().any(|fired| fired == trigger) {
                self.flaw(
                    format!("{key}.creates_on"),
                    format!("\"{trigger}\" is not fired by this topic"),
                    format!("use one of {}", raw.triggers.values().cloned().collect::<Vec<_>>().join(", ")),
                );
            }
        }
        Receive {
            topic,
            order_id: raw.order_id.clone(),
            trigger: raw.trigger.clone(),
            triggers: raw.triggers.clone().into_iter().collect(),
            message_id: raw.message_id.clone(),
            user_id: raw.user_id.clone(),
            reason: raw.reason.clone(),
            creates_on: raw.creates_on.clone(),
        }
    }

    fn emit(&mut self, index: usize, raw: &RawEmit) -> Option<Emit> {
        let key = format!("emits[{index}]");
        match (&raw.entering, raw.on_change) {
            (Some(state), false) if state == DELETED => {}
            (Some(state), false) => self.state(&format!("{key}.entering"), state),
            (None, true) => {}
            (Some(_), true) => self.flaw(&key, "has both entering and on_change", "keep one of the two"),
            (None, false) => {
                self.flaw(&key, "does not say when it is sent", "add entering = \"STATE\" or on_change = true");
            }
        }
        let topic = self.topic(&format!("{key}.topic"), &raw.topic);
        let order_id = Template::order_id();
        let mut template = |name: &str, value: &toml::Value| {
            Template::read(value)
                .map_err(|(place, problem)| {
                    let dot = if place.is_empty() || place.starts_with('[') { "" } else { "." };
                    self.flaw(
                        format!("{key}.{name}{dot}{place}"),
                        problem,
                        "use one of those alone, or text without braces",
                    );
                })
                .ok()
        };
        let body = template("body", &raw.body);
        let key = raw.key.as_ref().map_or(Some(order_id), |value| template("key", value));
        Some(Emit { entering: raw.entering.clone(), topic, key: key?, body: body? })
    }

    fn topic(&mut self, key: &str, text: &str) -> String {
        let topic = self.expand(key, text);
        if settings::topic(&topic).is_err() {
            let problem = format!("{} is no name of a topic", named(text, &topic));
            self.flaw(key, problem, "use up to 249 letters, digits, ., _ and -");
        }
        topic
    }

    /// `${NAME:-default}`, or the text itself.
    fn expand(&mut self, key: &str, text: &str) -> String {
        let Some(inner) = text.strip_prefix("${").and_then(|text| text.strip_suffix('}')) else {
            return text.to_owned();
        };
        let (name, default) = match inner.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inner, None),
        };
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            self.flaw(key, format!("\"{name}\" is no name of a variable"), "use letters, digits and _");
            return "unset".to_owned();
        }
        match (self.variables)(name).filter(|value| !value.is_empty()).or(default.map(ToOwned::to_owned)) {
            Some(value) => value,
            None => {
                self.flaw(
                    key,
                    format!("the variable {name} is not set"),
                    format!("set it, or give a default: ${{{name}:-…}}"),
                );
                "unset".to_owned()
            }
        }
    }

    /// Can every state be reached, and left where it is not terminal?
    fn reach(&mut self, raw: &File, lifecycle: &Lifecycle) {
        let mut reached = lifecycle.reachable(&lifecycle.initial);
        if !lifecycle.content.change_in.is_empty() {
            reached.extend(lifecycle.reachable(&lifecycle.content.leads_to));
        }
        for (name, state) in &raw.states {
            if !reached.contains(&name.as_str()) {
                self.flaw(
                    format!("states.{name}"),
                    "cannot be reached from the initial state",
                    format!("add a transition to it (to = \"{name}\"), or take it out"),
                );
            }
            if !state.terminal && !raw.transitions.iter().any(|way| way.from.contains(name)) {
                self.flaw(
                    format!("states.{name}"),
                    "nothing leaves it, and it is not terminal",
                    format!("write {name} = {{ terminal = true }}, or add a transition from it"),
                );
            }
        }
        for (index, receive) in raw.receives.iter().enumerate() {
            for trigger in receive.triggers.values() {
                self.has_transition(&format!("receives[{index}].triggers"), trigger, raw);
            }
        }
    }
}

/// More than any order goes through, and checked in no time.
const MAX_STATES: usize = 200;
const MAX_TRANSITIONS: usize = 1_000;

/// Longer than anybody waits, and short enough to be added to any time.
const MAX_TIMEOUT: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// A value, and the variable that it came from.
fn named(raw: &str, value: &str) -> String {
    match raw.strip_prefix("${").map(|raw| raw.split([':', '}']).next().unwrap_or_default()) {
        Some(name) => format!("{name}=\"{value}\""),
        None => format!("\"{value}\""),
    }
}

/// May a lifecycle, a state or a trigger be called so?
#[must_use]
pub fn is_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    (1..=64).contains(&name.len()) && name.chars().all(legal)
}
