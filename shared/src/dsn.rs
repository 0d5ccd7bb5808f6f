//! What `POSTGRES_DSN` says: where the server is, and how far TLS is trusted. And addresses of others
//! that may have a password in them.
//!
//! Whoever forgets to encode a password has its parts read as a host or a database, and those are
//! logged. So what could be meant otherwise is refused, and no error holds anything of what it refuses.

use std::net::Ipv6Addr;

use anyhow::{Context as _, bail, ensure};
use percent_encoding::percent_decode_str;
use tokio_postgres::{Config, config::Host};

use crate::tls::Tls;

const FORMS: &str = "postgres://user:password@host:port/database, or pairs of key=value";
const ENCODE: &str = "in its user, password and database write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23, % as \
                      %25 and a blank as %20";
const QUOTE: &str = "put single quotes around a value that has blanks in it, and write ' and \\ there as \\' and \\\\";

/// A user and a password apart from where the server is.
pub(crate) struct Address<'a> {
    pub user: Option<&'a str>,
    pub hosts: &'a str,
    /// With its slash.
    pub path: &'a str,
    /// With what is before it.
    pub query: &'a str,
}

/// Takes a URL apart behind `scheme://`.
///
/// # Errors
/// When a character of the password might end it; with the remedy, and without the password.
pub(crate) fn address(text: &str) -> anyhow::Result<Address<'_>> {
    ensure!(!text.contains(char::is_control), "has a line break, or another control character, within");
    let (authority, rest) = text.split_at(text.find(['/', '?', '#']).unwrap_or(text.len()));
    let (path, query) = rest.split_at(rest.find(['?', '#']).unwrap_or(rest.len()));
    let (user, hosts) = match authority.split_once('@') {
        Some((user, hosts)) => (Some(user), hosts),
        // What looks like the end of the host was in the password.
        None if rest.contains('@') => bail!("cannot be read: {ENCODE}"),
        None => (None, authority),
    };
    let is_encoded = [user.unwrap_or_default(), hosts, path].into_iter().all(is_encoded);
    if !is_encoded || hosts.contains('@') || path.contains('@') || !hosts.split(',').all(is_host) {
        bail!("cannot be read: {ENCODE}");
    }
    Ok(Address { user, hosts, path, query })
}

/// Are there no blanks in it, and is each % one of two digits?
fn is_encoded(text: &str) -> bool {
    let is_code = |code: &str| code.get(..2).is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    !text.contains(char::is_whitespace) && text.split('%').skip(1).all(is_code)
}

/// `name`, `name:5432`, `[::1]:5432`, `%2Frun%2Fpostgresql`, or nothing.
fn is_host(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[') {
        Some(bracketed) => match bracketed.split_once(']') {
            Some((name, port)) if !name.is_empty() => (name, port.strip_prefix(':').or(port.is_empty().then_some(""))),
            _ => return false,
        },
        None => text.split_once(':').map_or((text, Some("")), |(name, port)| (name, Some(port))),
    };
    let is_bracketed = text.starts_with('[');
    let is_named = name.chars().all(|c| is_of_name(c) || c == '%' || (is_bracketed && c == ':'));
    is_named && port.is_some_and(|port| port.is_empty() || port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// What the DSN says.
///
/// # Errors
/// What is wrong with it and what to do, without anything of it.
pub(crate) fn read(dsn: &str) -> anyhow::Result<(Config, Tls)> {
    let url = ["postgres://", "postgresql://"].into_iter().find_map(|scheme| dsn.strip_prefix(scheme));
    let is_url = dsn.split('=').next().is_some_and(|key| key.contains("://"));
    match url {
        Some(text) => of_url(text),
        None if dsn.starts_with(['\'', '"']) => bail!("has quotes around it; take them away"),
        None if is_url || !dsn.contains('=') => bail!("is neither {FORMS}"),
        None => of_pairs(dsn),
    }
}

fn of_url(text: &str) -> anyhow::Result<(Config, Tls)> {
    let Address { user, hosts, path, query } = address(text)?;
    let database = path.strip_prefix('/').unwrap_or_default();
    if database.contains('/') || query.starts_with('#') {
        bail!("cannot be read: {ENCODE}");
    }
    let mut pairs = Vec::new();
    for pair in query.trim_start_matches('?').split('&').filter(|pair| !pair.is_empty()) {
        pairs.push(pair.split_once('=').with_context(|| format!("cannot be read: {ENCODE}"))?);
    }
    let decoded = pairs.iter().map(|(key, value)| (*key, percent_decode_str(value).decode_utf8_lossy().into_owned()));
    let (rest, tls) = Tls::taken_from(decoded)?;
    // Those that are left go on as they were written.
    let kept = pairs.iter().filter(|(key, _)| rest.iter().any(|(left, _)| left == key));
    let kept: String = kept.map(|(key, value)| format!("&{key}={value}")).collect();
    let user = user.map(|user| format!("{user}@")).unwrap_or_default();
    let dsn = format!("postgres://{user}{hosts}/{database}?sslmode={}{kept}", tls.mode());
    // Behind another @ there is the host that was meant, and before it the password.
    let is_safe = !query.contains('@');
    config(&dsn, ENCODE, |key| is_safe && names_before_password(&pairs, key)).map(|config| (config, tls))
}

fn of_pairs(text: &str) -> anyhow::Result<(Config, Tls)> {
    let pairs = pairs(text).with_context(|| format!("cannot be read: {QUOTE}"))?;
    let (rest, tls) = Tls::taken_from(pairs.iter().map(|(key, value)| (*key, value.clone())))?;
    let quoted = |value: &str| value.replace('\\', "\\\\").replace('\'', "\\'");
    let mut dsn = format!("sslmode={}", tls.mode());
    for (key, value) in &rest {
        dsn.push_str(&format!(" {key}='{}'", quoted(value)));
    }
    config(&dsn, QUOTE, |key| names_before_password(&pairs, key)).map(|config| (config, tls))
}

fn config(dsn: &str, remedy: &str, may_be_named: impl Fn(&str) -> bool) -> anyhow::Result<Config> {
    let config: Config = dsn.parse().map_err(|error: tokio_postgres::Error| {
        let told = format!("{:#}", anyhow::Error::from(error));
        match told.split_once("unknown option `").map(|(_, key)| key.trim_end_matches('`')) {
            Some(key) if may_be_named(key) => anyhow::anyhow!("has a parameter that is not known here: {key}"),
            Some(_) => anyhow::anyhow!("has a parameter that is not known here; {remedy}"),
            // Those name parameters, and not what they say.
            None => anyhow::anyhow!("cannot be read ({told}); {remedy}"),
        }
    })?;
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let servers = hosts.len().max(addresses.len());
    ensure!(servers > 0, "names no host");
    ensure!(hosts.iter().all(is_server), "names a host that cannot be one; its port is to stand in port; {FORMS}");
    // A user or database takes in the password behind it where other signs stand between the pairs.
    let is_name = |name: Option<&str>| name.is_none_or(|name| !name.contains([';', '=']));
    ensure!(is_name(config.get_user()) && is_name(config.get_dbname()), "is neither {FORMS}");
    // A connection would find these wrong, each time.
    ensure!(ports.len() <= 1 || ports.len() == servers, "has {} ports for {servers} hosts", ports.len());
    let is_even = hosts.is_empty() || addresses.is_empty() || hosts.len() == addresses.len();
    ensure!(is_even, "has {} hostaddr for {} host", addresses.len(), hosts.len());
    Ok(config)
}

fn is_server(host: &Host) -> bool {
    match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            let address = name.split_once('%').map_or(name.as_str(), |(address, _zone)| address);
            (!name.is_empty() && name.chars().all(is_of_name)) || address.parse::<Ipv6Addr>().is_ok()
        }
    }
}

fn is_of_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '.' | '-' | '_')
}

/// What is behind a password may be a part of it.
fn names_before_password<V>(pairs: &[(&str, V)], key: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_lowercase() || c == '_';
    let mut before = pairs.iter().map(|(key, _)| *key).take_while(|key| *key != "password");
    key.chars().all(is_plain) && before.any(|name| name == key)
}

/// `key=value key='a value'`, as libpq reads it; `None`: it does not.
fn pairs(text: &str) -> Option<Vec<(&str, String)>> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (key, value) = rest.split_once('=')?;
        let key = key.trim_end();
        if key.is_empty() || key.contains(char::is_whitespace) {
            return None;
        }
        let value = value.trim_start();
        let is_quoted = value.starts_with('\'');
        let mut chars = value.char_indices().skip(usize::from(is_quoted));
        let mut told = String::new();
        let end = loop {
            match chars.next() {
                Some((_, '\\')) => told.push(chars.next()?.1),
                Some((at, '\'')) if is_quoted => break at + 1,
                Some((at, c)) if !is_quoted && c.is_whitespace() => break at,
                Some((_, c)) => told.push(c),
                None if is_quoted => return None,
                None => break value.len(),
            }
        };
        if is_quoted && value[end..].starts_with(|c: char| !c.is_whitespace()) {
            return None;
        }
        pairs.push((key, told));
        rest = value[end..].trim_start();
    }
    Some(pairs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio_postgres::config::{Host, SslMode};

    use super::*;

    fn refusal(dsn: &str) -> String {
        format!("{:#}", read(dsn).err().unwrap_or_else(|| panic!("{dsn} is taken")))
    }

    #[test]
    fn what_a_dsn_says_of_tls_is_taken_out_of_it() {
        let url =
            "postgres://u@h/db?sslmode=verify-full&sslrootcert=%2Fa%20b.pem&options=-c%20x%3Dy&application_name=a@b";
        let (config, tls) = read(url).unwrap();
        assert_eq!((config.get_options(), config.get_application_name()), (Some("-c x=y"), Some("a@b")));
        assert_eq!((config.get_ssl_mode(), tls.root_cert()), (SslMode::Require, Some("/a b.pem")));

        let (config, tls) = read("host=h sslmode='require' dbname=d sslrootcert=ca.pem").unwrap();
        assert_eq!(
            (config.get_ssl_mode(), config.get_dbname(), tls.root_cert()),
            (SslMode::Require, Some("d"), Some("ca.pem"))
        );

        let (config, _) = read("postgres://h/d").unwrap();
        assert_eq!((config.get_ssl_mode(), config.get_dbname()), (SslMode::Prefer, Some("d")));
        assert!(refusal("postgres://h?sslmode=sometimes").contains("sslmode"));
    }

    #[test]
    fn a_password_is_what_is_encoded_or_quoted() {
        for (dsn, password) in [
            ("postgres://shop:pa%40s%2Fs%23%3f%25%20@db/orders", "pa@s/s#?% "),
            (
                "postgresql://shop:p:a!$&'()*+,;=-._~ss@db:5433,db2/orders?target_session_attrs=read-write",
                "p:a!$&'()*+,;=-._~ss",
            ),
            ("host=db user=shop password=pa@s/s#?%ss dbname=orders", "pa@s/s#?%ss"),
            ("host=db user=shop password='pa  s\\'s sslmode=no' dbname=orders", "pa  s's sslmode=no"),
            ("host = db\n user = shop password=a\\ b", "a b"),
            ("postgres:///orders?host=%2Frun%2Fpostgresql&user=shop&password=x%26y", "x&y"),
            ("postgres://shop:x@[::1]:5432/orders", "x"),
        ] {
            let (config, _) = read(dsn).unwrap_or_else(|error| panic!("{dsn}: {error:#}"));
            assert_eq!(config.get_password(), Some(password.as_bytes()), "{dsn}");
            assert_eq!(config.get_user(), Some("shop"), "{dsn}");
        }
        let (config, _) = read("hostaddr=10.0.0.5,::1 user=u port=6432").unwrap();
        assert_eq!((config.get_hosts().len(), config.get_hostaddrs().len()), (0, 2));
        let (config, _) = read("postgres://u:p@db1:1,[fe80::1%25eth0]:2,%2Frun/orders").unwrap();
        assert_eq!(config.get_ports(), [1, 2, 5432]);
        assert_eq!(config.get_hosts()[1], Host::Tcp("fe80::1%eth0".to_owned()));
    }

    #[test]
    fn what_could_be_meant_otherwise_is_refused_without_any_of_it() {
        for password in [
            "XY@ZV",
            "XY#ZV",
            "XY/ZV",
            "XY?ZV",
            "XY%ZV",
            "XY ZV",
            "XY\nZV",
            "1/XY",
            "12?XY=ZV",
            "a@XY/ZV#1",
            "a@XY?ZV=1",
            "a@XY#ZV",
        ] {
            for dsn in [
                format!("postgres://shop:{password}@db/orders"),
                format!("postgresql://shop:{password}@127.0.0.1:5432/orders?sslmode=disable"),
                format!("postgres://{password}:x@db/orders"),
            ] {
                let told = refusal(&dsn);
                assert!(!told.contains("XY") && !told.contains("ZV") && !told.contains('\n'), "{dsn}: {told}");
                assert!(told.contains("%40") || told.contains("line break"), "{dsn}: {told}");
            }
        }
        for dsn in [
            "",
            "mysql://u:XY@h/db?a=ZV",
            "jdbc:postgresql://h/db?user=u&password=XY",
            "\"postgres://u:XY@h/db\"",
            "postgres://u:XY@h:port/db",
            "postgres://u:XY@h:70000/db",
            "postgres://u:XY@h/db?password=ZV&XYZ=1",
            "postgres://u:XY@/db",
            "host=h password=XY ZV user=u",
            "host=h password=XY ZV=1 user=u",
            "host=h password='XY ZV",
            "host=h password='XY'ZV'",
            "host=h port=XY",
            "host=h;port=5432;user=u;password=XY;dbname=d",
            "host=h,password=XY user=u",
            "host=h user=u;password=XY",
            "postgres://u@h/d;password=XY",
            "postgres://h/d?user=u;password=XY",
            "postgres://u@h/d?host=h;password=XY",
            "host=XY:5432 user=u",
            "host=h,g port=1,2,3 password=XY",
            "host=h,g hostaddr=127.0.0.1 password=XY",
            "user=u password=XY",
            "XY",
        ] {
            let told = refusal(dsn);
            assert!(!told.contains("XY") && !told.contains("ZV"), "{dsn}: {told}");
        }
        assert!(refusal("postgres://u:p@h/db?schema=public").contains("schema"));
        assert!(refusal("host=h pool_size=3 password=x").contains("pool_size"));
    }

    proptest! {
        /// Whatever the password is, encoded it serves, and as it is it serves or is not told.
        #[test]
        fn no_password_is_told(password in "[a-c@#/?%:&= ]{0,8}ZQ[a-c@#/?%:&= ]{0,8}") {
            let encoded: String = password.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let (config, _) = read(&format!("postgres://u:{encoded}@h/d")).unwrap();
            prop_assert_eq!(config.get_password(), Some(password.as_bytes()));
            match read(&format!("postgres://u:{password}@h/d")) {
                Ok((config, _)) => prop_assert_eq!(config.get_hosts(), &[Host::Tcp("h".to_owned())]),
                Err(error) => {
                    let told = format!("{error:#}");
                    prop_assert!(!told.contains("ZQ"), "{}", told);
                }
            }
        }
    }
}
