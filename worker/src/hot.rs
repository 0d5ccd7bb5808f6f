//! A door to what each event goes through here, for the micro-benchmarks alone (the feature `hot`).
//! No logic of its own.

use shared::{
    lifecycle::Lifecycles,
    message::{Answer, Headers, now},
};

use crate::{
    handler::{as_told, handle},
    record::{Record, Said},
    reply::{Asked, reply},
};

/// An event as it came, and what it is read with.
pub struct Desk {
    lifecycles: &'static Lifecycles,
    record: Record,
}

impl Desk {
    #[must_use]
    pub fn with(headers: Headers, body: Vec<u8>) -> Self {
        let topic = "orders.events".to_owned();
        let record = Record {
            topic,
            partition: 0,
            offset: 1,
            timestamp: 1,
            key: None,
            headers: Some(headers),
            body: Some(body),
        };
        Self { lifecycles: Lifecycles::embedded().expect("lifecycles"), record }
    }

    /// What it says.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self) -> Result<impl Sized + '_, String> {
        self.record.read(self.lifecycles)
    }

    /// Reads it and decides, as for an order to which nothing has happened since.
    ///
    /// # Errors
    /// When it cannot be read or handled.
    pub fn handle(&self) -> Result<Answer, String> {
        Ok(self.said_and_answer()?.1)
    }

    /// The whole way, to the answer as it is sent.
    ///
    /// # Errors
    /// When it cannot be read or handled.
    pub fn reply(&self) -> Result<impl Sized + use<>, String> {
        let (said, answer) = self.said_and_answer()?;
        Ok(reply(&Asked::of(&self.record, &said), answer))
    }

    fn said_and_answer(&self) -> Result<(Said<'_>, Answer), String> {
        let said = self.record.read(self.lifecycles)?;
        let Said::Event(event) = &said else { return Err("not an event".to_owned()) };
        let handling = handle(self.lifecycles, &as_told(event), event, now()).map_err(|trouble| format!("{trouble:?}"));
        let answer = handling?.answer;
        Ok((said, answer))
    }
}
