//! What a measurement stands on: servers that are given, and on them a database and topics of its
//! own, which are gone when it ends.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use rdkafka::ClientConfig;
use uuid::Uuid;

use crate::database::Database;
use crate::process;
use crate::product::{self, Product};
use crate::topics::Topics;

/// What the service runs on.
#[derive(Args, Clone)]
pub struct Servers {
    /// A PostgreSQL on which databases may be created.
    #[arg(long, env = "POSTGRES_DSN", hide_env_values = true, default_value = "")]
    pub postgres_dsn: String,

    #[arg(long, env = "KAFKA_BROKERS", default_value = "")]
    pub kafka_brokers: String,

    /// librdkafka properties, as key=value,key=value.
    #[arg(long, env = "KAFKA_CONFIG", hide_env_values = true, default_value = "")]
    pub kafka_config: String,
}

impl Servers {
    /// # Errors
    /// When one is not named.
    pub fn check(&self) -> anyhow::Result<()> {
        for (value, key) in [(&self.postgres_dsn, "POSTGRES_DSN"), (&self.kafka_brokers, "KAFKA_BROKERS")] {
            ensure!(!value.is_empty(), "{key} is not set; `make bench` provides it");
        }
        Ok(())
    }

    /// For a client of Kafka's.
    #[must_use]
    pub fn kafka(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.kafka_brokers).set("socket.nagle.disable", "true");
        for (key, value) in self.kafka_config.split(',').filter_map(|pair| pair.split_once('=')) {
            config.set(key.trim(), value.trim());
        }
        config
    }
}

/// A database and topics of a run's own, and a folder for its logs and results.
pub struct Ground {
    pub servers: Servers,
    /// Time-ordered and random: says when it was made, and two runs do not meet.
    pub name: String,
    pub database: Database,
    pub topics: Topics,
    pub folder: PathBuf,
}

impl Ground {
    /// # Errors
    /// When the binaries are not built, or a server is not there.
    pub async fn create(servers: &Servers) -> anyhow::Result<Self> {
        product::ensure_built(&process::own_folder()?)?;
        let folder = default_folder()?;
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let name = format!("bench_{}", Uuid::now_v7().simple());
        let database = Database::create(&servers.postgres_dsn, &name).await?;
        Ok(Self { servers: servers.clone(), topics: Topics::named(&name), name, database, folder })
    }

    pub async fn remove(self) -> anyhow::Result<()> {
        self.database.remove().await?;
        self.topics.remove(&self.servers).await
    }

    /// The service of these binaries, on it; `more` are settings beside the service's defaults.
    pub async fn start(&self, binaries: &Path, more: &[(&'static str, String)]) -> anyhow::Result<Product> {
        let Servers { kafka_brokers, kafka_config, .. } = self.servers.clone();
        let mut settings = vec![("KAFKA_BROKERS", kafka_brokers), ("KAFKA_CONFIG", kafka_config)];
        settings.extend_from_slice(more);
        Product::start(binaries, &self.database, &self.topics, &settings, &self.folder).await
    }
}

/// Does the work on a ground of its own, and leaves nothing behind but the results, however it ends;
/// with `keep` the database and the topics too.
///
/// # Errors
/// Those of the work, or that it was interrupted.
pub async fn used<T>(
    servers: &Servers,
    keep: bool,
    interrupted: impl Future<Output = ()>,
    work: impl AsyncFnOnce(&Ground) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let ground = Ground::create(servers).await?;
    let result = tokio::select! {
        result = work(&ground) => result,
        () = interrupted => Err(anyhow::anyhow!("interrupted")),
    };
    if keep {
        eprintln!("kept: database {}, topics {} and {}", ground.name, ground.topics.events, ground.topics.acks);
    } else if let Err(error) = ground.remove().await {
        eprintln!("tidying up: {error:#}");
    }
    result
}

/// Of logs and results: `target/bench`, from `target/release/bench`.
///
/// # Errors
/// When this program stands elsewhere.
pub fn default_folder() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let target = own.parent().and_then(Path::parent).context("this program stands in no target folder")?;
    Ok(target.join("bench"))
}

pub fn step(what: &str) {
    eprintln!("bench: {what}");
}
