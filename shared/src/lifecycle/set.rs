//! All lifecycles that a process knows: those of the release, and those of `LIFECYCLES_DIR`.

use std::{collections::HashMap, path::Path};

use anyhow::Context as _;

use super::{
    Lifecycle, Receive,
    file::{self, BadFile, Flaw, Variables},
};
use crate::order::Amounts;

/// The files of the release.
const EMBEDDED: &[(&str, &str)] = &[
    ("lifecycles/marketplace.toml", include_str!("../../../lifecycles/marketplace.toml")),
    ("lifecycles/payment.toml", include_str!("../../../lifecycles/payment.toml")),
    ("lifecycles/retail.toml", include_str!("../../../lifecycles/retail.toml")),
    ("lifecycles/shipment.toml", include_str!("../../../lifecycles/shipment.toml")),
    ("lifecycles/stock-saga.toml", include_str!("../../../lifecycles/stock-saga.toml")),
];

#[derive(Debug)]
pub struct Lifecycles {
    all: Vec<Lifecycle>,
    /// What orders of all of them may come to.
    pub amounts: Amounts,
}

impl Lifecycles {
    /// Reads the release's files and, where there is one, those of a folder (`*.toml`), which may
    /// put another one in the place of one of ours by its name. `own_topics` are those that no
    /// lifecycle may use. Read once per process, and kept as long as that lives.
    ///
    /// # Errors
    /// All that is wrong with the first file that is, by file, key and remedy.
    pub fn load(
        folder: Option<&Path>,
        own_topics: &[&str],
        amounts: Amounts,
        variables: Variables<'_>,
    ) -> anyhow::Result<&'static Self> {
        let mut all = assemble(given(folder)?, own_topics, variables)?;
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Box::leak(Box::new(Self { all, amounts })))
    }

    /// The lifecycle of one file, first, and all others: of a file in the folder as they are there, of
    /// any other as if it lay there in the place of one of its name.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn with(
        file: &Path,
        folder: Option<&Path>,
        own_topics: &[&str],
        variables: Variables<'_>,
    ) -> anyhow::Result<Vec<Lifecycle>> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file).with_context(|| name.clone())?;
        let lifecycle = file::read(&name, &text, variables)?;
        let mut files = given(folder)?;
        let same = file.canonicalize().with_context(|| name.clone())?;
        let beside = files.len();
        files.retain(|(other, _)| Path::new(other).canonicalize().map_or(true, |other| other != same));
        if files.len() == beside {
            files.retain(|(name, text)| {
                file::read(name, text, variables).map_or(true, |other| other.name != lifecycle.name)
            });
        }
        // Last: what clashes is then said of this file, not of the other.
        files.push((name, text));
        let mut all = assemble(files, own_topics, variables)?;
        let first = all.iter().position(|one| one.name == lifecycle.name).unwrap_or(0);
        all.swap(0, first);
        Ok(all)
    }

    /// The release's own, with the topics and times of their files.
    ///
    /// # Errors
    /// Never for the files of a release: a test reads them.
    pub fn embedded() -> anyhow::Result<&'static Self> {
        Self::load(None, &[], Amounts::Payable, &|_| None)
    }

    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Lifecycle> {
        self.all.iter().find(|lifecycle| lifecycle.name == name)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Lifecycle> {
        self.all.iter()
    }

    /// The lifecycle that a topic's messages move, and how to read them.
    #[must_use]
    pub fn received(&self, topic: &str) -> Option<(&Lifecycle, &Receive)> {
        self.all.iter().find_map(|lifecycle| {
            lifecycle.receives.iter().find(|receive| receive.topic == topic).map(|receive| (lifecycle, receive))
        })
    }

    /// Topics of messages from elsewhere.
    pub fn received_topics(&self) -> impl Iterator<Item = &str> {
        self.all.iter().flat_map(|lifecycle| &lifecycle.receives).map(|receive| receive.topic.as_str())
    }

    /// Topics of messages to others; each once.
    #[must_use]
    pub fn emitted_topics(&self) -> Vec<&str> {
        let mut topics: Vec<_> =
            self.all.iter().flat_map(|lifecycle| &lifecycle.emits).map(|emit| emit.topic.as_str()).collect();
        topics.sort_unstable();
        topics.dedup();
        topics
    }

    /// Where the clock moves orders: each "lifecycle state".
    #[must_use]
    pub fn timed(&self) -> Vec<String> {
        let of = |lifecycle: &Lifecycle| {
            let states = lifecycle.timeouts.iter().filter(|timeout| timeout.after.is_some());
            states.map(|timeout| format!("{} {}", lifecycle.name, timeout.state)).collect::<Vec<_>>()
        };
        self.all.iter().flat_map(of).collect()
    }

    /// Lifecycles whose messages tell what was ordered: for others nobody need read that.
    #[must_use]
    pub fn telling_content(&self) -> Vec<&str> {
        let tells = |lifecycle: &&Lifecycle| {
            lifecycle.emits.iter().any(|emit| emit.key.tells_content() || emit.body.tells_content())
        };
        self.all.iter().filter(tells).map(|lifecycle| lifecycle.name.as_str()).collect()
    }

    /// Names of all lifecycles, for messages.
    #[must_use]
    pub fn names(&self) -> String {
        self.all.iter().map(|lifecycle| lifecycle.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// The lifecycles of these files, and those of the release whose names they do not take.
fn assemble(
    given: Vec<(String, String)>,
    own_topics: &[&str],
    variables: Variables<'_>,
) -> anyhow::Result<Vec<Lifecycle>> {
    let mut files: HashMap<String, String> = HashMap::new();
    let mut all: Vec<Lifecycle> = Vec::new();
    for (name, text) in given {
        let lifecycle = file::read(&name, &text, variables)?;
        if let Some(other) = files.insert(lifecycle.name.clone(), name.clone()) {
            let problem = format!("\"{}\" is the name of {other} too", lifecycle.name);
            return Err(bad(&name, "name", &problem, "give each lifecycle a name of its own").into());
        }
        all.push(lifecycle);
    }
    for (name, text) in EMBEDDED {
        let lifecycle = file::read(name, text, variables)?;
        if !files.contains_key(&lifecycle.name) {
            files.insert(lifecycle.name.clone(), (*name).to_owned());
            all.push(lifecycle);
        }
    }
    check_topics(&all, &files, own_topics)?;
    Ok(all)
}

/// Files of a folder, by name.
fn given(folder: Option<&Path>) -> anyhow::Result<Vec<(String, String)>> {
    let Some(folder) = folder else { return Ok(Vec::new()) };
    let name = || format!("LIFECYCLES_DIR={}", folder.display());
    let mut paths = std::fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>())
        .with_context(name)?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok((path.display().to_string(), text))
    };
    paths.iter().map(|path| read(path)).collect()
}

fn check_topics(all: &[Lifecycle], files: &HashMap<String, String>, own: &[&str]) -> Result<(), BadFile> {
    let mut received: HashMap<&str, &str> = HashMap::new();
    let file = |lifecycle: &Lifecycle| files.get(&lifecycle.name).map_or("", String::as_str);
    for lifecycle in all {
        for (index, receive) in lifecycle.receives.iter().enumerate() {
            let key = format!("receives[{index}].topic");
            let problem = match received.insert(&receive.topic, &lifecycle.name) {
                _ if own.contains(&receive.topic.as_str()) => format!("{} is our own topic", receive.topic),
                Some(other) => format!("{} is received by {other} already", receive.topic),
                None => continue,
            };
            return Err(bad(file(lifecycle), &key, &problem, "let each topic be received once"));
        }
    }
    for lifecycle in all {
        for (index, emit) in lifecycle.emits.iter().enumerate() {
            let problem = match received.get(emit.topic.as_str()) {
                _ if own.contains(&emit.topic.as_str()) => format!("{} is our own topic", emit.topic),
                Some(receiver) => format!("{} is received by {receiver}: it would hear itself", emit.topic),
                None => continue,
            };
            let key = format!("emits[{index}].topic");
            return Err(bad(file(lifecycle), &key, &problem, "send to a topic that no lifecycle receives"));
        }
    }
    Ok(())
}

fn bad(file: &str, key: &str, problem: &str, remedy: &str) -> BadFile {
    let flaw = Flaw { key: key.to_owned(), problem: problem.to_owned(), remedy: remedy.to_owned() };
    BadFile { file: file.to_owned(), flaws: vec![flaw] }
}
