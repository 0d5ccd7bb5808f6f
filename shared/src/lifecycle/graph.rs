//! A lifecycle as a picture: Mermaid's state diagram, which GitHub and many editors draw.

use std::fmt::Write as _;

use super::Lifecycle;

/// The diagram's text.
#[must_use]
pub fn mermaid(lifecycle: &Lifecycle) -> String {
    let mut out = format!("---\ntitle: {}\n---\nstateDiagram-v2\n", lifecycle.name);
    let mut line = |text: String| {
        let _ = writeln!(out, "    {text}");
    };
    line(format!("[*] --> {}", id(&lifecycle.initial)));
    for way in &lifecycle.transitions {
        let mut causes: Vec<String> = Vec::new();
        for cause in &way.on {
            match lifecycle.timeouts.iter().find(|timeout| timeout.trigger == *cause).map(|timeout| timeout.after) {
                None => causes.push(cause.clone()),
                Some(Some(after)) => causes.push(format!("{cause} (after {})", humantime::format_duration(after))),
                Some(None) => {} // switched off
            }
        }
        causes.extend(way.by_hand.then(|| "by hand".to_owned()));
        for from in way.from.iter().filter(|_| !causes.is_empty()) {
            line(format!("{} --> {}: {}", id(from), id(&way.to), causes.join(", ")));
        }
    }
    for from in &lifecycle.content.change_in {
        if *from != lifecycle.content.leads_to {
            line(format!("{} --> {}: new content", id(from), id(&lifecycle.content.leads_to)));
        }
    }
    for state in lifecycle.states.iter().filter(|state| state.terminal) {
        line(format!("{} --> [*]", id(&state.name)));
    }
    for state in lifecycle.states.iter().filter(|state| state.name.contains('-')) {
        line(format!("{} : {}", id(&state.name), state.name));
    }
    for emit in &lifecycle.emits {
        match &emit.entering {
            Some(state) => line(format!("note right of {}: sends to {}", id(state), emit.topic)),
            None => line(format!("note right of {}: every change is sent to {}", id(&lifecycle.initial), emit.topic)),
        }
    }
    out
}

/// Mermaid takes a hyphen for the beginning of an arrow.
fn id(name: &str) -> String {
    name.replace('-', "_")
}
