//! Settings from flags, the environment and `.env`, in this order, under the names of DESIGN 8; each secret also
//! from a file. clap reads flags; what it cannot know (older names, files, `.env`) is put before them.
//!
//! Blanks and line breaks around a value are nobody's intention: `echo` and editors leave them. And no
//! error shows what may be a secret.

use std::{collections::HashMap, ffi::OsString, fs::File, io::Read as _};

use clap::{
    Arg, ArgAction, Command, Parser,
    error::{ContextKind, ContextValue, ErrorKind},
};

use crate::{message::unmarked, output::note};

/// Names that the five seed systems use for the same thing.
const OLDER_NAMES: &[(&str, &str)] = &[
    ("DATABASE_URL", "POSTGRES_DSN"),
    ("DB_CONNECTION_STRING", "POSTGRES_DSN"),
    ("DB_DSN", "POSTGRES_DSN"),
    ("KAFKA_BROKER", "KAFKA_BROKERS"),
    ("PORT", "API_PORT"),
    ("SERVER_PORT", "API_PORT"),
    ("HTTP_PORT", "API_PORT"),
    ("METRICS_PORT", "WORKER_PORT"),
    ("OTEL_SERVICE_NAME", "SERVICE_NAME"),
    ("REDIS_URL", "REDIS_ADDR"),
];

/// Reads the settings of a process; prints help or an error and exits where clap does.
#[must_use]
pub fn parse<S: Parser>() -> S {
    let dotenv = dotenv().unwrap_or_else(|error| {
        note(&format!("error: .env: {error}"));
        std::process::exit(2);
    });
    let environment = |name: &str| std::env::var(name).ok();
    parse_from(std::env::args_os(), environment, &dotenv).unwrap_or_else(|error| error.exit())
}

/// What lifecycles' files may name: variables of the environment, else of `.env`.
pub fn variables() -> impl Fn(&str) -> Option<String> {
    let dotenv = dotenv().unwrap_or_default();
    move |name: &str| given(std::env::var(name).ok()).or_else(|| given(dotenv.get(name).cloned()))
}

/// A value without what is around it; one of nothing else says nothing, as `JWT_KEY_FILE=` does.
fn given(value: Option<String>) -> Option<String> {
    value.map(|value| trimmed(&value).to_owned()).filter(|value| !value.is_empty())
}

/// Without blanks, line breaks and byte order marks at its ends.
fn trimmed(value: &str) -> &str {
    value.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}')
}

/// The pairs of `.env`; none where there is no such file.
fn dotenv() -> Result<HashMap<String, String>, String> {
    std::fs::read(".env").map_or(Ok(HashMap::new()), |bytes| pairs(&bytes))
}

fn pairs(file: &[u8]) -> Result<HashMap<String, String>, String> {
    let file = unmarked(file);
    dotenvy::from_read_iter(file).collect::<Result<_, _>>().map_err(|error| match error {
        // It holds the line, or its value: perhaps a password.
        dotenvy::Error::LineParse(text, _) => {
            let whole = String::from_utf8_lossy(file);
            let first = text.lines().next().unwrap_or_default();
            let line = whole.lines().enumerate().find(|(_, line)| !first.is_empty() && line.contains(first));
            let place = line.map_or_else(
                || "a line".to_owned(),
                |(index, line)| {
                    let key = line.split_once('=').map(|(key, _)| key.trim()).filter(|key| is_name(key));
                    format!("line {}{}", index + 1, key.map(|key| format!(" ({key})")).unwrap_or_default())
                },
            );
            format!("{place} cannot be read; put single quotes around the value")
        }
        error => error.to_string(),
    })
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// What is said somewhere under a name.
type Place<'a> = &'a dyn Fn(&str) -> Option<String>;

/// As [`parse`], over any environment but clap's own reading of it.
///
/// # Errors
/// When a setting is unknown or wrong; the message names it and where it came from.
pub fn parse_from<S: Parser>(
    args: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<String>,
    dotenv: &HashMap<String, String>,
) -> Result<S, clap::Error> {
    let mut command = with_files(S::command()).args_override_self(true);
    let known = command.clone();
    let mut args: Vec<OsString> = args.into_iter().collect();
    let flags = own_flags(&known, &mut args);
    let (mut supplied, mut origins, mut refusal) = (Vec::new(), Vec::new(), None);
    let places: [Place<'_>; 2] = [&|name| given(environment(name)), &|name| given(dotenv.get(name).cloned())];
    for arg in known.get_arguments().filter(|arg| matches!(arg.get_action(), ArgAction::Set)) {
        let (Some(flag), Some(name)) = (arg.get_long(), name_of(arg)) else { continue };
        if environment(name).is_some_and(|value| trimmed(&value).is_empty()) {
            command = command.mut_arg(arg.get_id(), |arg| arg.env(None));
        }
        let of_flag = |flag: &str| flags.get(flag).cloned();
        let file = file_of(arg).and_then(|(flag, _)| of_flag(&flag)).filter(|path| !path.is_empty());
        let found = match (of_flag(flag), file) {
            (Some(_), Some(_)) => Err(format!("--{flag} and --{flag}-file are both given; leave one out")),
            (Some(_), None) => continue,
            (None, Some(path)) => {
                content(&format!("--{flag}-file"), &path).map(|value| Some((format!("--{flag}-file"), value)))
            }
            (None, None) => {
                let names: Vec<&str> = std::iter::once(name).chain(older_names(name)).collect();
                let all =
                    places.iter().flat_map(|place| names.iter().map(move |name| told_by(name, is_secret(arg), place)));
                all.into_iter().find(|told| !matches!(told, Ok(None))).unwrap_or(Ok(None))
            }
        };
        match found {
            Ok(Some((origin, value))) => {
                supplied.push(OsString::from(format!("--{flag}={value}")));
                origins.push((format!("--{flag} "), origin));
            }
            Ok(None) => {}
            Err(reason) => refusal = refusal.or(Some(reason)),
        }
    }
    let mut args = args.into_iter();
    let all = args.next().into_iter().chain(supplied).chain(args);
    let mut for_refusals = command.clone();
    let matches = command.try_get_matches_from(all).map_err(|mut error| {
        let message = error.to_string();
        if let Some((_, origin)) = origins.iter().find(|(flag, _)| message.contains(flag.as_str())) {
            error.insert(
                ContextKind::Suggested,
                ContextValue::StyledStrs(vec![format!("the value came from {origin}").into()]),
            );
        }
        discreet(error, &known, &flags)
    })?;
    // Not before: whoever asks for help gets it.
    match refusal {
        Some(reason) => Err(for_refusals.error(ErrorKind::ValueValidation, reason)),
        None => S::from_arg_matches(&matches),
    }
}

fn name_of(arg: &Arg) -> Option<&str> {
    arg.get_env().and_then(|name| name.to_str())
}

fn older_names(name: &str) -> impl Iterator<Item = &str> {
    OLDER_NAMES.iter().filter(move |(_, new)| *new == name).map(|(old, _)| *old)
}

/// Is it one whose value nobody is to see?
fn is_secret(arg: &Arg) -> bool {
    arg.is_hide_env_values_set()
}

/// Flag and name of the file that a secret may come from.
fn file_of(arg: &Arg) -> Option<(String, String)> {
    let (flag, name) = (arg.get_long()?, name_of(arg)?);
    is_secret(arg).then(|| (format!("{flag}-file"), format!("{name}_FILE")))
}

/// The command with a file for each secret.
fn with_files(command: Command) -> Command {
    let of = |arg: &Arg| {
        let (flag, name) = file_of(arg)?;
        let help = format!("File whose content is {}", name_of(arg)?);
        // clap keeps the names of arguments for as long as the process lives.
        let [flag, name] = [flag, name].map(|text| &*text.leak());
        let heading = arg.get_help_heading().map(|heading| &*heading.to_owned().leak());
        let file = Arg::new(name).long(flag).env(name).value_name(name).action(ArgAction::Set);
        Some(file.help(help).help_heading(heading))
    };
    let files: Vec<Arg> = command.get_arguments().filter_map(of).collect();
    command.args(files)
}

/// What a place says under this name, or the file that it names; with the name that it was said under.
fn told_by(name: &str, is_secret: bool, place: Place<'_>) -> Result<Option<(String, String)>, String> {
    let file_name = format!("{name}_FILE");
    match (place(name), place(&file_name).filter(|_| is_secret)) {
        (Some(_), Some(_)) => Err(format!("{name} and {file_name} are both given; leave one out")),
        (Some(value), None) => Ok(Some((name.to_owned(), value))),
        (None, Some(path)) => content(&file_name, &path).map(|value| Some((file_name, value))),
        (None, None) => Ok(None),
    }
}

/// What the file says that a setting names; without the path, in whose place somebody may have put the secret.
fn content(name: &str, path: &str) -> Result<String, String> {
    /// More than any secret, with the certificates of a `KAFKA_CONFIG`.
    const LARGEST: u64 = 256 * 1024;
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LARGEST + 1).read_to_end(&mut bytes));
    match read {
        Err(error) => Err(format!("{name}: the file that it names cannot be read: {error}")),
        Ok(length) if length as u64 > LARGEST => {
            Err(format!("{name}: the file that it names has more than {} KiB: it is another", LARGEST / 1024))
        }
        Ok(_) => match String::from_utf8(bytes) {
            Ok(text) => given(Some(text)).ok_or_else(|| format!("{name}: the file that it names is empty")),
            Err(_) => Err(format!("{name}: the file that it names is not UTF-8")),
        },
    }
}

/// The settings among the arguments, up to the first word that is none: the rest is a command's. Their values
/// are without blanks at the ends from here on.
fn own_flags(command: &Command, args: &mut [OsString]) -> HashMap<String, String> {
    let takes_value = |flag: &str| {
        command.get_arguments().any(|arg| arg.get_long() == Some(flag) && matches!(arg.get_action(), ArgAction::Set))
    };
    let mut flags = HashMap::new();
    let mut rest = args.iter_mut().skip(1);
    while let Some(arg) = rest.next() {
        let Some(text) = arg.to_str().and_then(|arg| arg.strip_prefix("--")).filter(|text| !text.is_empty()) else {
            break;
        };
        if let Some((flag, value)) = text.split_once('=') {
            if takes_value(flag) {
                let (flag, value) = (flag.to_owned(), trimmed(value).to_owned());
                *arg = format!("--{flag}={value}").into();
                flags.insert(flag, value);
            }
        } else if takes_value(text) {
            let flag = text.to_owned();
            let Some(value) = rest.next() else { break };
            if let Some(text) = value.to_str() {
                let text = trimmed(text).to_owned();
                *value = text.clone().into();
                flags.insert(flag, text);
            }
        }
    }
    flags
}

/// The error without any secret: clap shows the value that it refuses, and each word that it does not know.
fn discreet(mut error: clap::Error, command: &Command, flags: &HashMap<String, String>) -> clap::Error {
    const HIDDEN: &str = "…";
    let hidden = || ContextValue::String(HIDDEN.to_owned());
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let secret = |flag: &&str| command.get_arguments().any(|arg| is_secret(arg) && arg.get_long() == Some(*flag));
    match error.kind() {
        ErrorKind::ValueValidation | ErrorKind::InvalidValue => {
            let (of, value) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue));
            let flag = of.trim_start_matches('-').split(' ').next().unwrap_or_default();
            // With an @ it may be an address with a password, put where none belongs.
            if !value.is_empty() && (secret(&flag) || value.contains('@')) {
                error.insert(ContextKind::InvalidValue, hidden());
            }
        }
        // The rest of a password that has a blank in it, and no quotes around it; or a setting without its dashes.
        ErrorKind::UnknownArgument | ErrorKind::InvalidSubcommand => {
            let kind = match error.kind() {
                ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
                _ => ContextKind::InvalidArg,
            };
            let remedy = match flags.keys().map(String::as_str).find(secret) {
                Some(flag) => format!("put quotes around the value of --{flag}, if there is a blank in it"),
                None if text(kind).contains(['@', '=']) => "a setting is given as --name=value".to_owned(),
                None => return error,
            };
            error.insert(kind, hidden());
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![remedy.into()]));
        }
        _ => {}
    }
    error
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv6Addr, str::FromStr as _};

    use super::super::{DbSettings, KafkaSettings, Listen};
    use super::*;

    #[derive(Debug, Parser)]
    struct Both {
        #[command(flatten)]
        db: DbSettings,
        #[command(flatten)]
        kafka: KafkaSettings,
        #[arg(long, env = "API_PORT", default_value = "8080")]
        api_port: Listen,
    }

    fn settings(flags: &[&str], environment: &[(&str, &str)], dotenv: &[(&str, &str)]) -> Result<Both, String> {
        let environment: HashMap<_, _> = environment.iter().copied().collect();
        let dotenv = dotenv.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let args = std::iter::once("test").chain(flags.iter().copied()).map(OsString::from);
        parse_from(args, |name| environment.get(name).map(|v| (*v).to_owned()), &dotenv)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_flag_counts_before_the_environment_and_that_before_the_file() {
        let port = |flags, environment, dotenv| settings(flags, environment, dotenv).unwrap().api_port;
        let at = |port| Listen::At((Ipv6Addr::UNSPECIFIED, port).into());
        assert_eq!(port(&[], &[], &[]), at(8080));
        assert_eq!(port(&[], &[], &[("API_PORT", "1")]), at(1));
        assert_eq!(port(&[], &[("PORT", ":2")], &[("API_PORT", "1")]), at(2));
        assert_eq!(port(&["--api-port", "3"], &[("PORT", ":2")], &[]), at(3));
        assert_eq!(port(&["--api-port=off"], &[], &[]), Listen::Off);
    }

    #[test]
    fn a_setting_without_a_value_is_as_good_as_none() {
        let read = settings(&[], &[], &[("API_PORT", ""), ("PORT", "7"), ("LIFECYCLES_DIR", ""), ("DB_MAX_CONNS", "")]);
        let read = read.unwrap();
        assert_eq!(read.api_port, Listen::At((Ipv6Addr::UNSPECIFIED, 7).into()));
        assert_eq!((read.kafka.lifecycles_dir, read.db.db_max_conns), (None, 10));
    }

    #[test]
    fn a_bad_value_is_refused_naming_the_setting_and_where_it_came_from() {
        for (environment, parts) in [
            (("PORT", "eighty"), ["API_PORT", "the value came from PORT", "must be a port"]),
            (("METRICS_PORT", "x"), ["", "", ""]),
        ] {
            match settings(&[], &[environment], &[]) {
                Err(message) => parts.iter().for_each(|part| assert!(message.contains(part), "{part} in {message}")),
                Ok(_) => assert_eq!(parts[0], "", "{environment:?} is not a setting here"),
            }
        }
        let message = settings(&["--db-query-timeout", "soon"], &[], &[]).unwrap_err();
        assert!(message.contains("DB_QUERY_TIMEOUT") && message.contains("30s"), "{message}");
        assert!(settings(&["--kafka-config", "nonsense"], &[], &[]).is_err());
    }

    /// A file with a secret in it, gone with the test.
    struct Held(String);

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    impl std::ops::Deref for Held {
        type Target = str;

        fn deref(&self) -> &str {
            &self.0
        }
    }

    fn file(name: &str, content: &[u8]) -> Held {
        let path = std::env::temp_dir().join(format!("orderstream-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Held(path.to_str().unwrap().to_owned())
    }

    #[test]
    fn what_is_around_a_value_is_none_of_it_wherever_it_is_given() {
        const DSN: &str = "postgres://u:p@h/d";
        for around in [" DSN", "DSN\n", "DSN\r\n", "\u{feff}DSN", "\t\n DSN \u{a0}\n\n"] {
            let dsn = around.replace("DSN", DSN);
            let port = around.replace("DSN", "7");
            let read = [
                settings(&[&format!("--postgres-dsn={dsn}"), "--api-port", &port], &[], &[]),
                settings(&[], &[("POSTGRES_DSN", &dsn), ("API_PORT", &port)], &[]),
                settings(&[], &[("DB_DSN", &dsn), ("SERVER_PORT", &port)], &[]),
                settings(&[], &[], &[("POSTGRES_DSN", &dsn), ("API_PORT", &port)]),
                settings(&[], &[("DATABASE_URL_FILE", &file("around", dsn.as_bytes())), ("PORT", &port)], &[]),
            ];
            for read in read {
                let read = read.unwrap();
                assert_eq!(
                    (&*read.db.postgres_dsn, read.api_port),
                    (DSN, Listen::from_str("7").unwrap()),
                    "{around:?}"
                );
            }
        }
        let read =
            settings(&[], &[("API_PORT", " \n"), ("PORT", "\u{feff}"), ("DB_MAX_CONNS", "\t")], &[("PORT", "5 ")]);
        let read = read.unwrap();
        assert_eq!((read.api_port, read.db.db_max_conns), (Listen::from_str("5").unwrap(), 10));
    }

    #[test]
    fn a_secret_comes_from_a_file_too_and_from_one_place_alone() {
        let [one, other] = [("one", "postgres://one/d\n"), ("other", "postgres://other/d")]
            .map(|(name, dsn)| file(name, dsn.as_bytes()));
        let kafka = file("kafka", b"# ours\nsasl.username=u\nsasl.password=p,w\r\n");
        let dsn = |flags: &[&str], environment: &[(&str, &str)], dotenv: &[(&str, &str)]| {
            settings(flags, environment, dotenv).map(|read| read.db.postgres_dsn.to_string())
        };
        assert_eq!(dsn(&[], &[("POSTGRES_DSN_FILE", &one)], &[]).unwrap(), "postgres://one/d");
        assert_eq!(dsn(&[], &[], &[("POSTGRES_DSN_FILE", &one)]).unwrap(), "postgres://one/d");
        assert_eq!(
            dsn(&["--postgres-dsn-file", &one], &[("POSTGRES_DSN_FILE", &other)], &[]).unwrap(),
            "postgres://one/d"
        );
        // What counts before counts before, file or not.
        assert_eq!(dsn(&[], &[("POSTGRES_DSN_FILE", &one)], &[("POSTGRES_DSN", "x")]).unwrap(), "postgres://one/d");
        assert_eq!(dsn(&["--postgres-dsn=x"], &[("POSTGRES_DSN_FILE", &one)], &[]).unwrap(), "x");
        assert_eq!(dsn(&[], &[("POSTGRES_DSN_FILE", &one), ("DATABASE_URL", "x")], &[]).unwrap(), "postgres://one/d");
        // What says nothing is not given.
        assert_eq!(dsn(&[], &[("POSTGRES_DSN_FILE", " "), ("POSTGRES_DSN", "x")], &[]).unwrap(), "x");
        let read = settings(&[], &[("KAFKA_CONFIG_FILE", &kafka)], &[]).unwrap();
        assert_eq!(read.kafka.kafka_config.0[1], ("sasl.password".to_owned(), "p,w".to_owned()));

        for (flags, environment, names) in [
            (
                vec![],
                vec![("POSTGRES_DSN", "s3cret"), ("POSTGRES_DSN_FILE", &*one)],
                ["POSTGRES_DSN and", "POSTGRES_DSN_FILE"],
            ),
            (vec![], vec![("DB_DSN", "s3cret"), ("DB_DSN_FILE", &one)], ["DB_DSN and", "DB_DSN_FILE"]),
            (
                vec!["--postgres-dsn=s3cret", "--postgres-dsn-file=x"],
                vec![],
                ["--postgres-dsn and", "--postgres-dsn-file"],
            ),
        ] {
            let told = dsn(&flags, &environment, &[]).unwrap_err();
            assert!(names.iter().all(|name| told.contains(name)) && !told.contains("s3cret"), "{told}");
        }
    }

    #[test]
    fn a_file_that_holds_no_secret_is_refused_by_the_settings_name() {
        let large = vec![b'x'; 300_000];
        let [empty, large, binary] = [("empty", b" \n" as &[u8]), ("large", &large), ("binary", b"\xff\xfe")]
            .map(|(name, content)| file(name, content));
        for (path, part) in [
            ("/nowhere/s3cret", "cannot be read"),
            ("/", "cannot be read"),
            (&*empty, "is empty"),
            (&*large, "is another"),
            (&*binary, "not UTF-8"),
            ("/dev/zero", "is another"),
            ("postgres://u:s3cret@h/d", "cannot be read"),
        ] {
            let told = settings(&[], &[("KAFKA_CONFIG_FILE", path)], &[]).unwrap_err();
            assert!(told.contains("KAFKA_CONFIG_FILE") && told.contains(part) && !told.contains("s3cret"), "{told}");
        }
        // Whoever asks for help gets it.
        let help = settings(&["--help"], &[("POSTGRES_DSN_FILE", "/nowhere")], &[]).unwrap_err();
        assert!(
            help.contains("--postgres-dsn-file <POSTGRES_DSN_FILE>") && help.contains("KAFKA_CONFIG_FILE"),
            "{help}"
        );
    }

    #[test]
    fn no_refusal_tells_a_secret() {
        for (flags, environment) in [
            (vec!["--kafka-config", "s3cret"], vec![]),
            (vec!["--kafka-config=s3cret.x"], vec![]),
            (vec![], vec![("KAFKA_CONFIG", "s3cret=x")]),
            (vec![], vec![("KAFKA_BROKERS", "kafka://u:s3cret@h:9092")]),
            (vec![], vec![("API_PORT", "http://u:s3cret@h:1")]),
            (vec!["--postgres-dsn", "postgres://u:pa", "s3cret@h/d"], vec![]),
            (vec!["--postgres-dsn=postgres://u:pa", "--s3cret@h/d"], vec![]),
            (vec!["postgres-dsn=postgres://u:s3cret@h/d"], vec![]),
            (vec!["postgres://u:s3cret@h/d"], vec![]),
            (vec!["kafka-config=sasl.password=s3cret"], vec![]),
            (vec!["-kafka-config=sasl.password=s3cret"], vec![]),
        ] {
            let told = settings(&flags, &environment, &[]).unwrap_err();
            assert!(!told.contains("s3cret"), "{flags:?} {environment:?}: {told}");
        }
        let read =
            settings(&["--postgres-dsn=postgres://u:s3cret@h/d", "--kafka-config=sasl.password=s3cret"], &[], &[]);
        assert!(!format!("{read:?}").contains("s3cret"));
        let told = settings(&[], &[("API_PORT", "eighty")], &[]).unwrap_err();
        assert!(told.contains("eighty"), "{told}");
    }

    #[test]
    fn a_line_of_the_file_that_cannot_be_read_is_told_by_number_and_name() {
        let read = pairs("\u{feff}API_PORT=1\nPOSTGRES_DSN='postgres://u:pa ss@h/d' # ours\r\n".as_bytes()).unwrap();
        assert_eq!((read["API_PORT"].as_str(), read["POSTGRES_DSN"].as_str()), ("1", "postgres://u:pa ss@h/d"));
        for (file, place) in [
            ("A=1\nPOSTGRES_DSN=postgres://u:pa s3cret@h/d\n", "line 2 (POSTGRES_DSN)"),
            ("A=1\nJWT_SECRET='s3cret\n", "line 2 (JWT_SECRET)"),
            ("s3cret\n", "line 1"),
        ] {
            let told = pairs(file.as_bytes()).unwrap_err();
            assert!(told.contains(place) && !told.contains("s3cret"), "{told}");
        }
    }
}
