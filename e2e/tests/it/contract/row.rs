//! The rows of `orders.txt`, which says how they are written, and of `shop.txt`, which goes on from there.

use std::{borrow::Cow, collections::HashMap};

use test_support::{HttpClient, Method, Reply};

/// An id that no order has.
const NOBODY: &str = "01890a5d-ac96-774b-bcce-b302099a8057";
const TABLES: [(&str, &str); 2] = [("orders.txt", include_str!("orders.txt")), ("shop.txt", include_str!("shop.txt"))];

/// What is sent, and what must come back.
#[derive(Clone, Debug)]
pub(super) struct Row {
    place: String,
    /// Of the API that is asked.
    pub(super) settings: Vec<(&'static str, &'static str)>,
    pub(super) has_worker: bool,
    pub(super) method: &'static str,
    pub(super) path: Cow<'static, str>,
    body: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    pub(super) status: u16,
    /// Of the problem.
    pub(super) kind: Option<&'static str>,
    /// What is made is called that.
    pub(super) name: Option<&'static str>,
    pub(super) said: Vec<&'static str>,
}

impl Row {
    pub(super) fn all() -> Vec<Self> {
        let mut rows: Vec<Self> = Vec::new();
        let (mut settings, mut has_worker) = (Vec::new(), false);
        let lines =
            TABLES.iter().flat_map(|(file, table)| table.lines().zip(1..).map(move |(text, n)| (file, n, text)));
        for (file, n, text) in lines.filter(|(_, _, text)| !text.is_empty() && !text.starts_with('#')) {
            let place = format!("{file}:{n}");
            if text.starts_with('=') {
                settings = text.split(' ').filter_map(|setting| setting.split_once('=')).collect();
                settings.retain(|(name, _)| !name.is_empty());
                has_worker |= text == "= a worker";
                continue;
            }
            let Some(more) = text.strip_prefix("  ") else {
                let mut words = text.splitn(3, ' ');
                let mut word = || words.next().unwrap_or_default();
                let (method, path, body) = (word(), word(), word());
                let (settings, headers, said) = (settings.clone(), Vec::new(), Vec::new());
                let (status, kind, name) = (0, None, None);
                let path = path.into();
                rows.push(Self { place, settings, has_worker, method, path, body, headers, status, kind, name, said });
                continue;
            };
            let row = rows.last_mut().unwrap_or_else(|| panic!("{place} belongs to no request"));
            if let Some(header) = more.strip_prefix("> ") {
                row.headers.push(header.split_once(": ").unwrap_or_else(|| panic!("{place} is no header")));
            } else if let Some(outcome) = more.strip_prefix("< ") {
                let (outcome, name) = outcome.split_once(" as ").map_or((outcome, None), |(o, name)| (o, Some(name)));
                let (status, kind) = outcome.split_once(' ').map_or((outcome, None), |(s, kind)| (s, Some(kind)));
                (row.status, row.kind, row.name) = (status.parse().expect("a status"), kind, name);
            } else {
                row.said.extend(more.split(" | "));
            }
        }
        assert!(rows.iter().all(|row| row.status != 0), "a row without an answer");
        rows
    }

    /// The same question without what makes it special: whatever it names is not there.
    pub(super) fn plain(&self) -> Self {
        Self { headers: vec![("prefer", "respond-async")], ..self.clone() }
    }

    /// The same with this query alone.
    pub(super) fn asking(&self, query: &str) -> Self {
        let path = self.path.split('?').next().unwrap_or_default();
        Self { path: format!("{path}?{query}").into(), ..self.clone() }
    }

    pub(super) fn with(mut self, header: (&'static str, &'static str)) -> Self {
        self.headers.push(header);
        self
    }

    pub(super) fn content_type(&self) -> &'static str {
        if self.path.starts_with("/orders/bulk") { "application/x-ndjson" } else { "application/json" }
    }

    pub(super) async fn send(&self, http: &HttpClient, names: &Names) -> Reply {
        let (path, body) = (names.fill_path(&self.path), names.fill(self.body).replace(r" \n ", "\n"));
        let headers: Vec<(&str, String)> =
            self.headers.iter().map(|(name, value)| (*name, names.fill(value))).collect();
        let mut headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        if !body.is_empty() && headers.iter().all(|(name, _)| *name != "content-type") {
            headers.push(("content-type", self.content_type()));
        }
        let method = Method::from_bytes(self.method.as_bytes()).expect("a method");
        let reply = http.send(method, &path, &headers, body.into()).await;
        reply.unwrap_or_else(|error| panic!("{}: {error:#}", self.told()))
    }

    /// For messages.
    pub(super) fn told(&self) -> String {
        format!("{} {} {}", self.place, self.method, self.path)
    }
}

/// What the names in braces stand for.
pub(super) struct Names(HashMap<String, String>);

impl Default for Names {
    fn default() -> Self {
        let known = [
            ("nobody", NOBODY.to_owned()),
            // More than MAX_BODY_BYTES.
            ("large", "x".repeat(300_000)),
            // More than are stored all or nothing.
            ("lines", "{}\n".repeat(10_001)),
        ];
        Self(known.into_iter().map(|(name, text)| (name.to_owned(), text)).collect())
    }
}

impl Names {
    /// What this answer has made.
    pub(super) fn learn(&mut self, name: &str, reply: &Reply) {
        let body = reply.json();
        let id = body["order_id"].as_str().or(body["data"]["id"].as_str());
        let id = id.unwrap_or_else(|| panic!("{name} has no id: {}", reply.summary()));
        self.0.insert(name.to_owned(), id.to_owned());
        if let Some(request) = body["correlation_id"].as_str() {
            self.0.insert(format!("{name}.request"), request.to_owned());
        }
    }

    pub(super) fn fill(&self, text: &str) -> String {
        // Bodies have braces, too.
        self.0.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
    }

    /// Names that stand for nothing are ids that nothing has.
    pub(super) fn fill_path(&self, path: &str) -> String {
        let mut filled = self.fill(path);
        while let Some((start, end)) = filled.find('{').zip(filled.find('}')) {
            filled.replace_range(start..=end, NOBODY);
        }
        filled
    }
}
