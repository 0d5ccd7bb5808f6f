//! Names on Kafka of the benchmark's own. The service makes the topics; they are deleted here.

use std::time::Duration;

use anyhow::Context;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;

use crate::ground::Servers;

const TIMEOUT: Duration = Duration::from_secs(10);

pub struct Topics {
    pub events: String,
    pub acks: String,
    pub group: String,
    /// Of Kafka's own request and reply.
    pub echo: [String; 2],
    /// Of the same with commits between.
    pub chain: [String; 2],
}

impl Topics {
    pub fn named(run: &str) -> Self {
        Self {
            events: format!("{run}.orders.events"),
            acks: format!("{run}.orders.ack"),
            group: format!("{run}.order-workers"),
            echo: ["requests", "replies"].map(|side| format!("{run}.echo.{side}")),
            chain: ["requests", "replies"].map(|side| format!("{run}.chain.{side}")),
        }
    }

    pub async fn remove(&self, servers: &Servers) -> anyhow::Result<()> {
        let admin: AdminClient<DefaultClientContext> = servers.kafka().create().context("connecting to Kafka")?;
        let options = AdminOptions::new().request_timeout(Some(TIMEOUT)).operation_timeout(Some(TIMEOUT));
        let own = [&self.events, &self.acks].into_iter().chain(&self.echo).chain(&self.chain);
        let deleted = admin.delete_topics(&own.map(String::as_str).collect::<Vec<_>>(), &options).await;
        // What a run that failed early has not made cannot be deleted, and need not be.
        deleted.context("deleting topics")?;
        let received = format!("{}.received", self.group);
        admin.delete_groups(&[self.group.as_str(), &received], &options).await.context("deleting the groups")?;
        Ok(())
    }
}
