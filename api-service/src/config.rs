//! The settings of `api-service`.

use std::{path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use shared::{
    order,
    settings::{self, CacheSettings, DbSettings, KafkaSettings, Listen, Secret},
};

use crate::{
    front::{Networks, PublicPath},
    http::headers::{AllowedHeaders, Origins, TRACING_HEADERS},
    identity::{
        Identity,
        token::{Source, Tokens},
    },
    orders::WaitLimits,
    prices::Prices,
    rate::Quota,
    request::Defaults,
};

/// What an event holds besides the items and the payload: ids, names, numbers, headers.
const EVENT_OVERHEAD: usize = 16 * 1024;

/// Takes orders over HTTP, makes them durable and tells Kafka.
#[derive(Debug, Parser)]
#[command(name = "api-service", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub config: Config,
}

#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Command {
    /// Bring the database's schema up to date, and end
    Migrate,
}

const EXAMPLES: &str = "\
Every setting is a flag and an environment variable; a .env file in the working directory serves too.

Examples:
  api-service --postgres-dsn 'postgres://shop:…@db/orders?sslmode=verify-full' --kafka-brokers k1:9092,k2:9092
  API_PORT=0 ACK_WAIT_MS=2000 api-service
  api-service migrate";

#[derive(Args, Clone, Debug)]
pub struct Config {
    #[command(flatten)]
    pub api: ApiSettings,
    #[command(flatten)]
    pub auth: AuthSettings,
    #[command(flatten)]
    pub limits: LimitSettings,
    #[command(flatten)]
    pub prices: PriceSettings,
    #[command(flatten)]
    pub db: DbSettings,
    #[command(flatten)]
    pub cache: CacheSettings,
    #[command(flatten)]
    pub kafka: KafkaSettings,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "HTTP")]
pub struct ApiSettings {
    /// Port, or address and port; 0 takes a free one and prints it
    #[arg(long, env = "API_PORT", value_name = "API_PORT", default_value = "8080")]
    pub api_port: Listen,
    /// Port of gRPC, or address and port; 0 takes a free one and prints it; off: none
    #[arg(long, env = "GRPC_PORT", value_name = "GRPC_PORT", default_value = "50051")]
    pub grpc_port: Listen,
    /// Port of the operators' routes (/admin), or address and port; off: none. Open on loopback only
    #[arg(long, env = "ADMIN_PORT", value_name = "ADMIN_PORT", default_value = "9080", value_parser = admin_port)]
    pub admin_port: Listen,
    /// What operators send as a bearer token; demanded where /admin is not on loopback
    #[arg(long, env = "ADMIN_TOKEN", value_name = "ADMIN_TOKEN", hide_env_values = true)]
    pub admin_token: Option<Secret>,
    /// How long a caller waits for the worker unless it says otherwise; 0: not at all
    #[arg(long, env = "ACK_WAIT_MS", value_name = "ACK_WAIT_MS", default_value = "5000")]
    pub ack_wait_ms: u64,
    /// How long a caller may wait at most; an hour is the limit
    #[arg(long, env = "ACK_WAIT_MAX_MS", value_name = "ACK_WAIT_MAX_MS", default_value = "30000", value_parser = clap::value_parser!(u64).range(..=3_600_000))]
    pub ack_wait_max_ms: u64,
    /// How many callers may wait at once; more are told 202 at once
    #[arg(long, env = "MAX_WAITERS", value_name = "MAX_WAITERS", default_value = "10000")]
    pub max_waiters: usize,
    /// How many callers may watch orders at once
    #[arg(long, env = "MAX_WATCHERS", value_name = "MAX_WATCHERS", default_value = "10000")]
    pub max_watchers: usize,
    /// How often is looked for what happened to the orders that are watched
    #[arg(long, env = "WATCH_INTERVAL", value_name = "WATCH_INTERVAL", default_value = "200ms", value_parser = settings::duration)]
    pub watch_interval: Duration,
    /// Largest body of a request
    #[arg(long, env = "MAX_BODY_BYTES", value_name = "MAX_BODY_BYTES", default_value = "262144")]
    pub max_body_bytes: usize,
    /// How long an Idempotency-Key is remembered
    #[arg(long, env = "IDEMPOTENCY_TTL", value_name = "IDEMPOTENCY_TTL", default_value = "24h", value_parser = settings::duration)]
    pub idempotency_ttl: Duration,
    /// Lifecycle of orders that name none
    #[arg(long, env = "DEFAULT_LIFECYCLE", value_name = "DEFAULT_LIFECYCLE", default_value = "marketplace")]
    pub default_lifecycle: String,
    /// Currency of orders that name none (ISO 4217)
    #[arg(long, env = "DEFAULT_CURRENCY", value_name = "DEFAULT_CURRENCY", default_value = "USD")]
    pub default_currency: String,
}

/// How it is known who calls.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Who may do what")]
pub struct AuthSettings {
    /// none: callers are trusted; header: a gateway before us sets X-User-Id and X-User-Role;
    /// jwt: each request carries a signed token
    #[arg(long, env = "AUTH_MODE", value_name = "AUTH_MODE", default_value = "none")]
    pub auth_mode: AuthMode,
    /// Secret of tokens signed with HS256
    #[arg(long, env = "JWT_SECRET", value_name = "JWT_SECRET", hide_env_values = true)]
    pub jwt_secret: Option<Secret>,
    /// File of the public key of tokens, in PEM
    #[arg(long, env = "JWT_KEY_FILE", value_name = "JWT_KEY_FILE")]
    pub jwt_key_file: Option<PathBuf>,
    /// File of the public keys of tokens, a JSON Web Key Set; read again when it changes
    #[arg(long, env = "JWT_JWKS_FILE", value_name = "JWT_JWKS_FILE")]
    pub jwt_jwks_file: Option<PathBuf>,
    /// Who must have issued a token (iss); by default anybody who has the key
    #[arg(long, env = "JWT_ISSUER", value_name = "JWT_ISSUER")]
    pub jwt_issuer: Option<String>,
    /// Whom a token must be for (aud); by default one that names nobody
    #[arg(long, env = "JWT_AUDIENCE", value_name = "JWT_AUDIENCE")]
    pub jwt_audience: Option<String>,
    /// The claim with the role, a text or a list: its name, or a JSON pointer such as /realm_access/roles
    #[arg(long, env = "JWT_ROLE_CLAIM", value_name = "JWT_ROLE_CLAIM", default_value = "role")]
    pub jwt_role_claim: String,
}

/// How often callers may ask, and from where.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Limits")]
pub struct LimitSettings {
    /// Requests a second that each caller may make (its user, else its address), or off
    #[arg(long, env = "RATE_LIMIT", value_name = "RATE_LIMIT", default_value = "off")]
    pub rate_limit: RateLimit,
    /// Requests that a caller may make at once; by default those of a second
    #[arg(long, env = "RATE_LIMIT_BURST", value_name = "RATE_LIMIT_BURST", value_parser = clap::value_parser!(u32).range(1..=MAX_RATE))]
    pub rate_limit_burst: Option<u32>,
    /// Networks of the proxies before us, which are believed when they say who calls (Forwarded, X-Forwarded-For) and
    /// under which path (X-Forwarded-Prefix): 10.0.0.0/8,fd00::/8
    #[arg(long, env = "TRUSTED_PROXIES", value_name = "TRUSTED_PROXIES", default_value = "")]
    pub trusted_proxies: Networks,
    /// What callers write before our paths, where a gateway takes that away and does not say so: /shop-api
    #[arg(long, env = "PUBLIC_PATH", value_name = "PUBLIC_PATH", default_value = "")]
    pub public_path: PublicPath,
    /// Origins whose pages may call from a browser: https://shop.example,http://localhost:3000, or
    /// * for all; by default none
    #[arg(long, env = "CORS_ALLOWED_ORIGINS", value_name = "CORS_ALLOWED_ORIGINS", default_value = "")]
    pub cors_allowed_origins: Origins,
    /// Headers that those pages may send beside the API's own, which they always may, or * for all; by default what
    /// tracing and monitoring in browsers adds
    #[arg(long, env = "CORS_ALLOWED_HEADERS", value_name = "CORS_ALLOWED_HEADERS", default_value = TRACING_HEADERS)]
    pub cors_allowed_headers: AllowedHeaders,
}

/// More than one process answers.
const MAX_RATE: i64 = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateLimit {
    Off,
    PerSecond(u32),
}

impl FromStr for RateLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<u32>() {
            _ if text == "off" => Ok(Self::Off),
            Ok(rate) if (1..=MAX_RATE).contains(&i64::from(rate)) => Ok(Self::PerSecond(rate)),
            _ => Err(format!("must be a whole number from 1 to {MAX_RATE}, or off")),
        }
    }
}

impl LimitSettings {
    /// How often a caller may ask, if that matters.
    ///
    /// # Errors
    /// Naming the settings that contradict each other.
    pub(crate) fn quota(&self) -> anyhow::Result<Option<Quota>> {
        match (self.rate_limit, self.rate_limit_burst) {
            (RateLimit::Off, None) => Ok(None),
            (RateLimit::Off, Some(burst)) => bail!("RATE_LIMIT_BURST={burst} means nothing without RATE_LIMIT"),
            (RateLimit::PerSecond(rate), burst) => Ok(Some(Quota { rate, burst: burst.unwrap_or(rate) })),
        }
    }
}

/// What items without a price cost.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Prices")]
pub struct PriceSettings {
    /// Service that knows the prices of items posted to /api/orders without one; by default each
    /// item must have its own
    #[arg(long, env = "PRODUCT_SERVICE_URL", value_name = "PRODUCT_SERVICE_URL", hide_env_values = true)]
    pub product_service_url: Option<Secret>,
    /// How long the prices of an order may take, all tries together
    #[arg(long, env = "PRODUCT_SERVICE_TIMEOUT", value_name = "PRODUCT_SERVICE_TIMEOUT", default_value = "2s", value_parser = settings::duration)]
    pub product_service_timeout: Duration,
    /// How long a price is remembered
    #[arg(long, env = "PRODUCT_CACHE_TTL", value_name = "PRODUCT_CACHE_TTL", default_value = "30s", value_parser = settings::duration)]
    pub product_cache_ttl: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AuthMode {
    None,
    Header,
    Jwt,
}

/// A port alone is one of loopback: operators' routes are not for everybody.
fn admin_port(text: &str) -> Result<Listen, String> {
    match text.strip_prefix(':').unwrap_or(text).parse::<u16>() {
        Ok(port) => Ok(Listen::Loopback(port)),
        Err(_) => text.parse(),
    }
}

impl Config {
    /// What no single setting shows, and the files that settings name.
    ///
    /// # Errors
    /// Naming the setting or the file that is to be changed.
    pub fn check(&self) -> anyhow::Result<Defaults> {
        self.db.check()?;
        self.kafka.check()?;
        self.identity()?;
        self.limits.quota()?;
        self.prices.open()?;
        // As it must stand in a header.
        if self.admin_token().is_some_and(|token| token.contains(char::is_control)) {
            bail!("ADMIN_TOKEN has a line break, or another control character, within");
        }
        if let Listen::At(address) = self.api.admin_port
            && !address.ip().is_loopback()
            && self.admin_token().is_none()
        {
            bail!(
                "ADMIN_PORT={address} is not on loopback: set ADMIN_TOKEN, or ADMIN_PORT=127.0.0.1:{}",
                address.port()
            );
        }
        let (wait, most) = (self.api.ack_wait_ms, self.api.ack_wait_max_ms);
        if wait > most {
            bail!("ACK_WAIT_MS={wait} is more than anybody may wait: lower it, or raise ACK_WAIT_MAX_MS={most}");
        }
        if self.api.max_body_bytes == 0 {
            bail!("MAX_BODY_BYTES=0 would take no order");
        }
        if let Err(reason) = order::currency(&self.api.default_currency) {
            bail!("DEFAULT_CURRENCY={:?} {reason}", self.api.default_currency);
        }
        // An order's items and its payload may each have come in a body of their own.
        let event = self.api.max_body_bytes.saturating_mul(2).saturating_add(EVENT_OVERHEAD);
        let limit = self.max_message_bytes();
        if event > limit {
            bail!(
                "MAX_BODY_BYTES={} is too much: events of {event} bytes would not fit a Kafka message of {limit} \
                 (message.max.bytes, which KAFKA_CONFIG can raise; so must the topic's max.message.bytes)",
                self.api.max_body_bytes
            );
        }
        let lifecycles = self.kafka.lifecycles()?;
        let Some(lifecycle) = lifecycles.find(&self.api.default_lifecycle) else {
            bail!("DEFAULT_LIFECYCLE={:?} is not one of {}", self.api.default_lifecycle, lifecycles.names());
        };
        Ok(Defaults { lifecycles, lifecycle, currency: self.api.default_currency.clone() })
    }

    /// How it is known who calls.
    ///
    /// # Errors
    /// Naming the setting or the file that is to be changed.
    pub(crate) fn identity(&self) -> anyhow::Result<Identity> {
        let auth = &self.auth;
        if let (true, Some(name)) = (auth.auth_mode != AuthMode::Jwt, auth.of_tokens()) {
            bail!("{name} means nothing without AUTH_MODE=jwt, and nobody's token would be looked at");
        }
        match auth.auth_mode {
            AuthMode::None => Ok(Identity::None),
            AuthMode::Header => Ok(Identity::Header),
            AuthMode::Jwt => {
                let source = auth.source()?;
                let (issuer, audience) = (given(&auth.jwt_issuer), given(&auth.jwt_audience));
                let tokens = Tokens::new(&source, issuer, audience, &auth.jwt_role_claim)?;
                Ok(Identity::Jwt(Arc::new(tokens)))
            }
        }
    }

    pub(crate) fn admin_token(&self) -> Option<Arc<str>> {
        Secret::given(self.api.admin_token.as_ref())
    }

    fn max_message_bytes(&self) -> usize {
        const LIBRDKAFKA_DEFAULT: usize = 1_000_000;
        let own = self.kafka.kafka_config.0.iter().rev().find(|(key, _)| key == "message.max.bytes");
        own.and_then(|(_, value)| value.parse().ok()).unwrap_or(LIBRDKAFKA_DEFAULT)
    }

    pub(crate) fn wait_limits(&self) -> WaitLimits {
        WaitLimits {
            default: Duration::from_millis(self.api.ack_wait_ms),
            max: Duration::from_millis(self.api.ack_wait_max_ms),
        }
    }
}

impl PriceSettings {
    /// Where prices are asked for, if anywhere.
    ///
    /// # Errors
    /// Naming the setting that is to be changed.
    pub(crate) fn open(&self) -> anyhow::Result<Option<Prices>> {
        let Some(url) = Secret::given(self.product_service_url.as_ref()) else { return Ok(None) };
        let prices = Prices::new(&url, self.product_service_timeout, self.product_cache_ttl);
        // Without the value: it may hold a password.
        prices.context("PRODUCT_SERVICE_URL").map(Some)
    }
}

impl AuthSettings {
    /// A setting that is given and is about tokens.
    fn of_tokens(&self) -> Option<&'static str> {
        let is_given = |path: &Option<PathBuf>| path.as_ref().is_some_and(|path| !path.as_os_str().is_empty());
        [
            ("JWT_SECRET", Secret::given(self.jwt_secret.as_ref()).is_some()),
            ("JWT_KEY_FILE", is_given(&self.jwt_key_file)),
            ("JWT_JWKS_FILE", is_given(&self.jwt_jwks_file)),
            ("JWT_ISSUER", given(&self.jwt_issuer).is_some()),
            ("JWT_AUDIENCE", given(&self.jwt_audience).is_some()),
        ]
        .into_iter()
        .find_map(|(name, is_given)| is_given.then_some(name))
    }

    fn source(&self) -> anyhow::Result<Source> {
        let secret = Secret::given(self.jwt_secret.as_ref());
        let file = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        match (secret, file(&self.jwt_key_file), file(&self.jwt_jwks_file)) {
            (Some(secret), None, None) => Ok(Source::Secret(secret)),
            (None, Some(path), None) => Ok(Source::Pem(path)),
            (None, None, Some(path)) => Ok(Source::Jwks(path)),
            _ => bail!("AUTH_MODE=jwt needs just one of JWT_SECRET, JWT_KEY_FILE and JWT_JWKS_FILE"),
        }
    }

    /// The file whose keys may change while we run.
    pub(crate) fn jwks_file(&self) -> Option<PathBuf> {
        match (self.auth_mode, self.source()) {
            (AuthMode::Jwt, Ok(Source::Jwks(path))) => Some(path),
            _ => None,
        }
    }
}

fn given(setting: &Option<String>) -> Option<&str> {
    setting.as_deref().filter(|text| !text.is_empty())
}
