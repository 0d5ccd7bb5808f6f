//! What can be asked on the command line, and what is said in answer: results on standard output,
//! all else on standard error.

use std::{
    ffi::OsString,
    io::Read as _,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, parser::ValueSource};
use clap_complete::Shell;
use hyper::{HeaderMap, Method, StatusCode, header::HeaderValue};
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::{
    bulk,
    http::{self, Answer, Identity, PREFER, Service, encoded},
    output::{note, say},
    sample, send,
    show::{self, Happened, Order},
    watch,
};

/// Orders on the command line: create them, look at them, watch them.
///
/// Ends with 0 when all was carried out, with 1 when something was refused or failed, with 2 when the
/// command line makes no sense.
#[derive(Debug, Parser)]
#[command(name = "orderstream", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  orderstream create order.json
  echo '{\"user_id\":\"alice\",\"amount\":5}' | orderstream create --wait 10
  orderstream list --user alice --status done
  orderstream watch 01a1f940-5d67-71df-a13f-3c8b3232e538
  orderstream bulk orders.ndjson
  orderstream completions bash > /etc/bash_completion.d/orderstream";

#[derive(Args, Debug)]
struct Connection {
    /// Where the service is
    #[arg(long, global = true, env = "ORDERSTREAM_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// On whose behalf (X-User-Id)
    #[arg(id = "as", long = "as", global = true, env = "ORDERSTREAM_USER", value_name = "USER")]
    user: Option<String>,
    /// In what role (X-User-Role): service and admin see everybody's orders, where a gateway says who asks
    #[arg(long, global = true, env = "ORDERSTREAM_ROLE")]
    role: Option<String>,
    /// Sent as a bearer token
    #[arg(long, global = true, env = "ORDERSTREAM_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// File whose content is the token
    #[arg(long, global = true, env = "ORDERSTREAM_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// JSON as the service gives it, instead of text for people; a list one order a line
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create an order, or change one (if it has an order_id), from a file or standard input
    Create {
        /// One order as JSON; - for standard input. A marketplace's own order (with a customer_id) is
        /// sent as payload
        #[arg(default_value = "-")]
        file: PathBuf,
        /// Seconds to wait for the worker; 0: not at all. By default as long as the service has it
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u32>,
        /// Idempotency-Key: the same again is done once
        #[arg(long)]
        key: Option<String>,
    },
    /// One order
    Get {
        /// Its id; or, with --user, the marketplace's own id
        id: String,
        /// Whose order it is, where the id is the marketplace's
        #[arg(long)]
        user: Option<String>,
    },
    /// Orders, newest first
    List(Filter),
    /// All that happened to an order
    History {
        /// Its id
        id: String,
    },
    /// What happens to an order from now on, until it is where nothing moves it any more
    Watch {
        /// Its id
        id: String,
        /// Begin behind this version; 0: with the first
        #[arg(long, value_name = "VERSION", value_parser = clap::value_parser!(i64).range(0..))]
        since: Option<i64>,
    },
    /// Many orders in one request, one a line (NDJSON); nobody waits for the worker
    Bulk {
        /// The orders; - for standard input. A marketplace's own orders (with a customer_id) are sent
        /// as payloads
        file: PathBuf,
        /// All lines or none (new orders only, at most 10,000)
        #[arg(long)]
        all_or_none: bool,
    },
    /// A file of a marketplace's own orders, each in a request that waits for the worker; tells how
    /// long that took, and whether the amounts come to the file's own
    Send {
        /// The orders, one a line (id, customer_id, items)
        file: PathBuf,
        /// How many are under way at once
        #[arg(long, default_value = "16", value_name = "N")]
        concurrency: NonZeroUsize,
        /// How long each waits for the worker's answer
        #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
        wait: u32,
    },
    /// Completions for a shell
    Completions { shell: Shell },
}

#[derive(Args, Debug)]
struct Filter {
    /// Those of one user
    #[arg(long)]
    user: Option<String>,
    /// Those in one state
    #[arg(long)]
    status: Option<String>,
    /// Those of one lifecycle
    #[arg(long)]
    lifecycle: Option<String>,
    /// The one that has the marketplace's own id; wants --user
    #[arg(long, requires = "user")]
    external_id: Option<String>,
    /// Created at this time or later (RFC 3339)
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// Created before this time
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// Most orders
    #[arg(long, default_value = "50")]
    limit: NonZeroUsize,
}

impl Cli {
    /// The command line, and the environment where that says nothing.
    ///
    /// # Errors
    /// When it makes no sense, or asks for help.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let matches = Self::command().try_get_matches_from(args)?;
        let mut cli = Self::from_arg_matches(&matches)?;
        let is_flag = |name| matches.value_source(name) == Some(ValueSource::CommandLine);
        match (is_flag("token"), is_flag("token_file")) {
            (true, false) => cli.connection.token_file = None,
            (false, true) => cli.connection.token = None,
            _ => {}
        }
        Ok(cli)
    }
}

impl Connection {
    fn service(self) -> anyhow::Result<Service> {
        let token = match (given(self.token), self.token_file.filter(|path| !path.as_os_str().is_empty())) {
            (Some(_), Some(_)) => bail!("ORDERSTREAM_TOKEN and ORDERSTREAM_TOKEN_FILE are both given; leave one out"),
            (token, None) => token,
            // Without the path, in whose place somebody may have put the token.
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path).context("cannot read the file of ORDERSTREAM_TOKEN_FILE")?;
                Some(given(Some(text)).context("the file of ORDERSTREAM_TOKEN_FILE is empty")?)
            }
        };
        Service::new(trimmed(&self.url), &Identity { user: given(self.user), role: given(self.role), token })
    }
}

/// Without what `echo` and editors leave at the ends of a setting.
fn trimmed(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}')
}

fn given(text: Option<String>) -> Option<String> {
    text.map(|text| trimmed(&text).to_owned()).filter(|text| !text.is_empty())
}

/// Carries out what was asked; was all of it?
///
/// # Errors
/// Saying what failed, in the service's words where it refused.
pub async fn run(cli: Cli) -> anyhow::Result<bool> {
    let Cli { connection, command } = cli;
    if let Command::Completions { shell } = command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "orderstream", &mut script);
        say(String::from_utf8_lossy(&script).trim_end())?;
        return Ok(true);
    }
    let json = connection.json;
    let service = connection.service()?;
    match command {
        Command::Create { file, wait, key } => create(&service, &file, wait, key.as_deref(), json).await?,
        Command::Get { id, user } => {
            let path = match &user {
                Some(user) => format!("/orders/by-external/{}?user_id={}", encoded(&id), encoded(user)),
                None => format!("/orders/{}", encoded(&id)),
            };
            let answer = service.get(&path).await.map_err(in_flags)?;
            tell::<Order>(&answer, json, show::order)?;
        }
        Command::List(filter) => list(&service, filter, json).await?,
        Command::History { id } => {
            let path = format!("/orders/{}/history", encoded(&id));
            tell::<Vec<Happened>>(&service.get(&path).await?, json, |rows| show::history(rows))?;
        }
        Command::Watch { id, since } => {
            let told = |data: &str| {
                let line = if json { data.to_owned() } else { show::happened(&read(data.as_bytes())?) };
                say(&line)
            };
            watch::watch(&service, &id, since, told).await?;
        }
        Command::Bulk { file, all_or_none } => {
            return bulk::send(&service, &file, &bulk::Options { all_or_none, json }).await;
        }
        Command::Send { file, concurrency, wait } => {
            let options = send::Options { service, concurrency: concurrency.get(), wait };
            let summary = send::run(&options, sample::read(&file)?).await?;
            say(&summary.to_string())?;
            return Ok(summary.is_good());
        }
        Command::Completions { .. } => {}
    }
    Ok(true)
}

fn read<T: DeserializeOwned>(json: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(json).context("that is not what the order service answers")
}

fn tell<T: DeserializeOwned>(answer: &Answer, json: bool, text: impl Fn(&T) -> String) -> anyhow::Result<()> {
    if json { say(&String::from_utf8_lossy(&answer.body)) } else { say(&text(&read(&answer.body)?)) }
}

async fn create(
    service: &Service,
    file: &Path,
    wait: Option<u32>,
    key: Option<&str>,
    json: bool,
) -> anyhow::Result<()> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("reading standard input")?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    if sample::unmarked(&text).trim().is_empty() {
        bail!(
            "there is no order in {}",
            if file == Path::new("-") { "standard input".into() } else { file.display().to_string() }
        );
    }
    let mut headers = HeaderMap::from_iter([http::json()]);
    match wait {
        Some(0) => headers.insert(PREFER, HeaderValue::from_static("respond-async")),
        Some(seconds) => headers.insert(PREFER, HeaderValue::from_str(&format!("wait={seconds}"))?),
        None => None,
    };
    if let Some(key) = key {
        headers.insert("idempotency-key", HeaderValue::from_str(key).context("--key cannot stand in a header")?);
    }
    let body = Bytes::from(sample::request(sample::unmarked(&text).trim()).into_owned());
    let wait = Duration::from_secs(wait.unwrap_or_default().into());
    let answer = service.ask(Method::POST, "/orders", headers, Some(body), wait).await?.accepted()?;
    tell(&answer, json, show::done)?;
    if answer.status == StatusCode::ACCEPTED {
        note("stored; the worker has not handled it yet (orderstream watch tells when)");
    }
    Ok(())
}

async fn list(service: &Service, filter: Filter, json: bool) -> anyhow::Result<()> {
    const LARGEST_PAGE: usize = 200;
    let mut left = filter.limit.get();
    let mut query = Vec::new();
    for (name, value) in [
        ("user_id", filter.user),
        ("status", filter.status),
        ("lifecycle", filter.lifecycle),
        ("external_id", filter.external_id),
        ("created_from", filter.from),
        ("created_to", filter.to),
    ] {
        query.extend(value.map(|value| format!("{name}={}", encoded(&value))));
    }
    query.push(format!("limit={}", left.min(LARGEST_PAGE)));
    let mut path = Some(format!("/orders?{}", query.join("&")));
    let mut orders: Vec<Box<RawValue>> = Vec::new();
    while let Some(next) = path.take().filter(|_| left > 0) {
        let answer = service.get(&next).await.map_err(in_flags)?;
        let page: Vec<Box<RawValue>> = read(&answer.body)?;
        let page = page.into_iter().take(left);
        if json {
            for order in page {
                say(order.get())?;
                left -= 1;
            }
        } else {
            orders.extend(page);
            left = filter.limit.get() - orders.len();
        }
        path = answer.header("link").and_then(|link| next_page(link, service.path())).map(str::to_owned);
    }
    if !json {
        let read: anyhow::Result<Vec<Order>> = orders.iter().map(|order| read(order.get().as_bytes())).collect();
        say(&show::orders(&read?))?;
    }
    if path.is_some() {
        note("there are more: --limit");
    }
    Ok(())
}

/// A refusal in the words of this command line: what the service calls a parameter is a flag here.
fn in_flags(refusal: anyhow::Error) -> anyhow::Error {
    const FLAGS: [(&str, &str); 6] = [
        ("\n  /user_id ", "\n  --user "),
        ("\n  /created_from ", "\n  --from "),
        ("\n  /created_to ", "\n  --to "),
        ("\n  /status ", "\n  --status "),
        ("\n  /limit ", "\n  --limit "),
        ("at /orders/by-external/{external_id}?user_id=", "found with --user"),
    ];
    let text = FLAGS.iter().fold(format!("{refusal:#}"), |text, (parameter, flag)| text.replace(parameter, flag));
    anyhow!(text)
}

/// What `Link` names as the next page (RFC 8288): the service's own path. What a gateway has before it (`prefix`) is
/// in the service's URL already.
fn next_page<'a>(link: &'a str, prefix: &str) -> Option<&'a str> {
    let (target, params) = link.strip_prefix('<')?.split_once('>')?;
    let path = target.strip_prefix(prefix).filter(|path| path.starts_with('/')).unwrap_or(target);
    (params.contains("rel=\"next\"") && path.starts_with('/')).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_makes_sense() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_refusal_names_the_flag_that_was_given() {
        let said = "422: The request breaks rules\n  /created_from must be a time\n  /limit must be less";
        let told = "422: The request breaks rules\n  --from must be a time\n  --limit must be less";
        assert_eq!(in_flags(anyhow!(said)).to_string(), told);
    }

    #[test]
    fn who_asks_is_one_flag_and_whose_orders_are_listed_another() {
        let args = ["orderstream", "list", "--as", "bob", "--user", "alice"].map(OsString::from);
        let read = Cli::read(args).expect("arguments");
        assert_eq!(read.connection.user.as_deref(), Some("bob"));
        assert!(matches!(read.command, Command::List(filter) if filter.user.as_deref() == Some("alice")));
    }

    #[test]
    fn blanks_around_a_setting_go_and_a_token_may_come_from_a_file() {
        let service = |args: &[&str]| {
            let args = ["orderstream", "list"].iter().chain(args).map(OsString::from);
            Cli::read(args).expect("arguments").connection.service()
        };
        let good = service(&["--url", " http://a/\r\n", "--token", "\u{feff}t\n", "--role=\n"]).expect("a service");
        assert_eq!(good.url(), "http://a");
        let path = std::env::temp_dir().join(format!("orderstream-token-{}", std::process::id()));
        std::fs::write(&path, "t\n").expect("written");
        let path = path.to_str().expect("a path");
        service(&["--token-file", path]).expect("a service");
        assert!(service(&["--token-file", path, "--token=s3cret"]).is_err());
        std::fs::write(path, " \n").expect("written");
        for file in [path, "s3cret"] {
            let told = format!("{:#}", service(&["--token-file", file]).err().expect("a refusal"));
            assert!(told.contains("ORDERSTREAM_TOKEN_FILE") && !told.contains("s3cret"), "{told}");
        }
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn the_next_page_is_a_path_of_the_service() {
        let next = "/orders?cursor=x&limit=2";
        for (target, prefix) in [(next, ""), ("/shop-api/orders?cursor=x&limit=2", "/shop-api"), (next, "/shop-api")] {
            assert_eq!(next_page(&format!("<{target}>; rel=\"next\""), prefix), Some(next), "{target} {prefix}");
        }
        assert_eq!(next_page("<https://elsewhere/>; rel=\"next\"", ""), None);
        assert_eq!(next_page("</orders>; rel=\"prev\"", ""), None);
    }
}
