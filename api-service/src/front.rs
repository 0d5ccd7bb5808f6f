//! What stands before us: proxies, which say who calls through them, and under which path callers reach us. Only
//! those of `TRUSTED_PROXIES` are believed, since anybody can write their headers.

use std::{net::IpAddr, str::FromStr};

use axum::http::{HeaderMap, HeaderName, header};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
/// More than stand in a row anywhere.
const MOST_HOPS: usize = 32;
const LONGEST_PATH: usize = 256;

pub(crate) struct Front {
    pub trusted: Networks,
    pub path: PublicPath,
}

impl Front {
    /// Who calls, where this address is connected to us: each proxy that is trusted is asked for the one before it.
    /// What makes no sense is of nobody: then it is the last that is known.
    pub(crate) fn caller(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        if !self.trusted.contain(peer) {
            return peer;
        }
        let told = |name: HeaderName, read: fn(&str) -> Option<IpAddr>| {
            headers.contains_key(&name).then(|| self.follow(peer, headers, &name, read))
        };
        match (told(header::FORWARDED, forwarded_for), told(X_FORWARDED_FOR, address)) {
            // A proxy that writes one of them hands on what a caller has written into the other.
            (Some(one), Some(other)) if one != other => peer,
            (Some(caller), _) | (None, Some(caller)) => caller,
            (None, None) => peer,
        }
    }

    /// From the end, where the proxy next to us has written.
    fn follow(&self, peer: IpAddr, headers: &HeaderMap, name: &HeaderName, read: fn(&str) -> Option<IpAddr>) -> IpAddr {
        let lines = headers.get_all(name).iter().rev().map(|line| line.to_str().unwrap_or("?"));
        let mut caller = peer;
        for hop in lines.flat_map(|line| line.rsplit(',')).take(MOST_HOPS) {
            match read(hop.trim()) {
                Some(address) => caller = address,
                None => return caller,
            }
            if !self.trusted.contain(caller) {
                return caller;
            }
        }
        caller
    }

    /// What callers write before our paths, where that is something.
    pub(crate) fn prefix(&self, peer: Option<IpAddr>, headers: &HeaderMap) -> Option<PublicPath> {
        let told = peer.filter(|peer| self.trusted.contain(*peer)).and_then(|_| forwarded_prefix(headers));
        Some(told.unwrap_or_else(|| self.path.clone())).filter(|path| !path.0.is_empty())
    }
}

/// What each gateway has taken away; `None` where that is no path.
fn forwarded_prefix(headers: &HeaderMap) -> Option<PublicPath> {
    let mut whole = String::new();
    for line in headers.get_all(X_FORWARDED_PREFIX) {
        for part in line.to_str().ok()?.split(',') {
            whole.push_str(&part.trim().parse::<PublicPath>().ok()?.0);
        }
    }
    headers.contains_key(X_FORWARDED_PREFIX).then(|| whole.parse().ok())?
}

/// The `for` of an element of `Forwarded` (RFC 7239).
fn forwarded_for(element: &str) -> Option<IpAddr> {
    let mut found = None;
    for (name, value) in element.split(';').filter_map(|pair| pair.split_once('=')) {
        if name.trim().eq_ignore_ascii_case("for") && found.replace(value.trim()).is_some() {
            return None;
        }
    }
    let value = found?;
    address(value.strip_prefix('"').map_or(Some(value), |rest| rest.strip_suffix('"'))?)
}

/// An address, perhaps with a port, perhaps in brackets.
fn address(text: &str) -> Option<IpAddr> {
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<IpAddr>().ok();
    let with_port = || text.parse::<std::net::SocketAddr>().ok().map(|address| address.ip());
    text.parse().ok().or_else(with_port).or_else(bracketed).map(|address| address.to_canonical())
}

/// Addresses that begin with the same bits (`TRUSTED_PROXIES`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(Vec<Network>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u32,
}

impl Networks {
    fn contain(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }
}

impl Network {
    fn contains(self, address: IpAddr) -> bool {
        let same = match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => (own.to_bits() ^ other.to_bits()).leading_zeros(),
            (IpAddr::V6(own), IpAddr::V6(other)) => (own.to_bits() ^ other.to_bits()).leading_zeros(),
            _ => return false,
        };
        same >= self.bits
    }

    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u32>().ok()?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let length = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(length);
        // Callers are known by IPv4 addresses where they have some.
        let canonical = address.to_canonical();
        let bits = if canonical.is_ipv4() && address.is_ipv6() { bits.checked_sub(96)? } else { bits };
        (bits <= if canonical.is_ipv4() { 32 } else { 128 }).then_some(Self { address: canonical, bits })
    }
}

impl FromStr for Networks {
    type Err = String;

    /// `10.0.0.0/8,fd00::/8,192.0.2.7`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|part| !part.is_empty());
        let network = |part: &str| {
            Network::parse(part)
                .ok_or_else(|| format!("{part:?} is no network; give 10.0.0.0/8, fd00::/8 or an address"))
        };
        parts.map(network).collect::<Result<_, _>>().map(Self)
    }
}

/// What callers write before our paths (`PUBLIC_PATH`): empty, or a path without a slash at its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublicPath(String);

impl PublicPath {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PublicPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_suffix('/').unwrap_or(text);
        // Of RFC 3986, section 3.3: what ends no header, no quotation and no host.
        let is_of_path = |c: char| c.is_ascii_alphanumeric() || "-._~!$&'()*+;=:@%".contains(c);
        // Nor may it lead elsewhere.
        let is_segment = |segment: &str| {
            let leads_up = matches!(&*segment.to_ascii_lowercase().replace("%2e", "."), "" | "." | "..");
            !leads_up && segment.chars().all(is_of_path)
        };
        match path.strip_prefix('/') {
            None if path.is_empty() => Ok(Self::default()),
            Some(segments) if path.len() <= LONGEST_PATH && segments.split('/').all(is_segment) => {
                Ok(Self(path.to_owned()))
            }
            _ => Err(format!("must be a path such as /shop-api, of at most {LONGEST_PATH} characters")),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn front(trusted: &str, path: &str) -> Front {
        Front { trusted: trusted.parse().unwrap(), path: path.parse().unwrap() }
    }

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_holds_what_begins_as_it_does() {
        let networks: Networks = "10.0.0.0/8, 192.0.2.7\nfd00::/8,::1,::ffff:198.51.100.0/120".parse().unwrap();
        for inside in ["10.255.0.1", "192.0.2.7", "fd12::1", "::1", "198.51.100.9"] {
            assert!(networks.contain(ip(inside)), "{inside}");
        }
        for outside in ["11.0.0.1", "192.0.2.8", "fe80::1", "::2", "198.51.101.9", "::a00:1"] {
            assert!(!networks.contain(ip(outside)), "{outside}");
        }
        let all: Networks = "0.0.0.0/0".parse().unwrap();
        assert!(all.contain(ip("203.0.113.1")) && !all.contain(ip("::1")));
        assert_eq!("".parse(), Ok(Networks::default()));
        for bad in
            ["10.0.0.0/33", "10.0.0/8", "::1/129", "proxy", "10.0.0.1:80", "10.0.0.0/-1", "::ffff:1.2.3.4/95", "*"]
        {
            assert!(bad.parse::<Networks>().unwrap_err().contains("no network"), "{bad}");
        }
    }

    #[test]
    fn the_caller_is_the_first_that_no_trusted_proxy_is() {
        let front = front("10.0.0.0/8,fd00::/8", "");
        let caller = |peer: &str, lines: &[(&'static str, &str)]| front.caller(ip(peer), &headers(lines)).to_string();
        let xff = "x-forwarded-for";
        // Nobody else's word counts.
        assert_eq!(caller("203.0.113.1", &[(xff, "198.51.100.1")]), "203.0.113.1");
        assert_eq!(caller("10.0.0.1", &[]), "10.0.0.1");
        for (line, expected) in [
            ("198.51.100.1", "198.51.100.1"),
            ("198.51.100.1, 10.1.1.1", "198.51.100.1"),
            // What the caller wrote stands before what the proxies did.
            ("192.0.2.66, 198.51.100.1, 10.1.1.1", "198.51.100.1"),
            ("10.6.6.6, 198.51.100.1", "198.51.100.1"),
            ("198.51.100.1:4711", "198.51.100.1"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]:4711, [fd00::7]", "2001:db8::1"),
            ("::ffff:198.51.100.1", "198.51.100.1"),
            ("10.2.2.2, 10.1.1.1", "10.2.2.2"),
            ("198.51.100.1, unknown", "10.0.0.1"),
            ("198.51.100.1, unknown, 10.1.1.1", "10.1.1.1"),
            ("", "10.0.0.1"),
            ("ä", "10.0.0.1"),
        ] {
            assert_eq!(caller("10.0.0.1", &[(xff, line)]), expected, "{line}");
        }
        assert_eq!(caller("10.0.0.1", &[(xff, "192.0.2.66"), (xff, "198.51.100.1")]), "198.51.100.1");
        for (line, expected) in [
            ("for=198.51.100.1", "198.51.100.1"),
            ("For=\"198.51.100.1:80\";proto=https;by=10.0.0.1, for=10.1.1.1", "198.51.100.1"),
            ("proto=http; for=\"[2001:db8::1]:4711\"", "2001:db8::1"),
            ("for=\"[2001:db8::1]\"", "2001:db8::1"),
            ("for=192.0.2.66, for=198.51.100.1", "198.51.100.1"),
            ("for=\"192.0.2.66, for=198.51.100.1", "198.51.100.1"),
            ("for=_hidden", "10.0.0.1"),
            ("for=198.51.100.1;for=192.0.2.66", "10.0.0.1"),
            ("for=\"198.51.100.1", "10.0.0.1"),
            ("for=198.51.100.1, proto=https", "10.0.0.1"),
        ] {
            assert_eq!(caller("10.0.0.1", &[("forwarded", line)]), expected, "{line}");
        }
        // Who writes into the other header becomes nobody by it.
        let both = |one, other| caller("10.0.0.1", &[("forwarded", one), (xff, other)]);
        assert_eq!(both("for=198.51.100.1", "198.51.100.1"), "198.51.100.1");
        assert_eq!(both("for=192.0.2.66", "198.51.100.1"), "10.0.0.1");
        let many = "10.1.1.1,".repeat(10_000) + "10.1.1.2";
        assert_eq!(caller("10.0.0.1", &[(xff, &many)]), "10.1.1.1");
    }

    #[test]
    fn the_public_path_is_the_settings_or_a_trusted_gateways() {
        let front = front("10.0.0.0/8", "/own/");
        let prefix = |peer: &str, lines: &[(&'static str, &str)]| {
            front.prefix(Some(ip(peer)), &headers(lines)).map(|path| path.0)
        };
        let name = "x-forwarded-prefix";
        assert_eq!(prefix("203.0.113.1", &[(name, "/shop-api")]).as_deref(), Some("/own"));
        assert_eq!(prefix("10.0.0.1", &[]).as_deref(), Some("/own"));
        for (lines, expected) in [
            (&["/shop-api"][..], Some("/shop-api")),
            (&["/shop-api/"], Some("/shop-api")),
            (&["/a, /b/c"], Some("/a/b/c")),
            (&["/a", "/b"], Some("/a/b")),
            (&["/"], None),
        ] {
            let lines: Vec<_> = lines.iter().map(|line| (name, *line)).collect();
            assert_eq!(prefix("10.0.0.1", &lines).as_deref(), expected, "{lines:?}");
        }
        let long = format!("/{}", "x".repeat(LONGEST_PATH));
        for bad in [
            "//elsewhere",
            "shop",
            "/a/../b",
            "/a/%2E%2e",
            "/a//b",
            "/a?b",
            "/a#b",
            "/a>b",
            "/a b",
            "/ä",
            "https://x",
            "\\x",
            &long,
        ] {
            assert!(bad.parse::<PublicPath>().is_err(), "{bad}");
            assert_eq!(prefix("10.0.0.1", &[(name, bad)]).as_deref(), Some("/own"), "{bad}");
        }
        assert_eq!(
            prefix("10.0.0.1", &[(name, "/a"), (name, &long[..200]), (name, &long[..200])]).as_deref(),
            Some("/own")
        );
    }

    proptest! {
        #[test]
        fn no_header_panics_and_none_makes_a_stranger_of_an_untrusted_peer(
            line in r#"[fFor=",;: \[\]0-9a-f.]{0,60}"#, prefix in "[/a-z.%?,]{0,20}"
        ) {
            let front = front("10.0.0.0/8", "");
            let headers = headers(&[("forwarded", &line), ("x-forwarded-for", &line), ("x-forwarded-prefix", &prefix)]);
            front.caller(ip("10.0.0.1"), &headers);
            prop_assert_eq!(front.caller(ip("203.0.113.1"), &headers), ip("203.0.113.1"));
            if let Some(path) = front.prefix(Some(ip("10.0.0.1")), &headers) {
                prop_assert!(path.0.starts_with('/') && !path.0.contains("//") && !path.0.contains(['?', ',']));
            }
        }
    }
}
