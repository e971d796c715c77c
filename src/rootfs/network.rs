//! The files that make a network usable: hosts(5) and resolv.conf(5), as text.

/// Name servers and search domains; an empty list means "the system's".
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// `search` domains.
    pub searches: Vec<String>,
    /// `options`.
    pub options: Vec<String>,
}

impl Dns {
    /// Three empty lists mean that the job has no `dns` block.
    pub fn is_unset(&self) -> bool {
        self.servers.is_empty() && self.searches.is_empty() && self.options.is_empty()
    }

    /// Reads a resolv.conf; what else it holds is left out.
    pub fn parse(text: &str) -> Self {
        let mut dns = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let rest = |words: std::str::SplitWhitespace<'_>| words.map(str::to_owned).collect::<Vec<_>>();
            match words.next() {
                Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
                Some("search" | "domain") => dns.searches = rest(words),
                Some("options") => dns.options.extend(rest(words)),
                _ => {}
            }
        }
        dns
    }

    /// The file: each list as given, or the system's where it is empty.
    pub fn render(&self, system: &Self) -> String {
        fn or<'a>(own: &'a [String], system: &'a [String]) -> &'a [String] {
            if own.is_empty() { system } else { own }
        }
        let mut text = String::new();
        for server in or(&self.servers, &system.servers) {
            text.push_str(&format!("nameserver {server}\n"));
        }
        for (keyword, list) in
            [("search", or(&self.searches, &system.searches)), ("options", or(&self.options, &system.options))]
        {
            if !list.is_empty() {
                text.push_str(&format!("{keyword} {}\n", list.join(" ")));
            }
        }
        text
    }
}

/// A hosts file with the usual names, and one line for the container when it has an address.
pub fn hosts(own: Option<(&str, &str)>) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
         ff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    if let Some((address, name)) = own {
        text.push_str(&format!("{address}\t{name}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_list_falls_back_to_the_systems() {
        let system = Dns::parse("# comment\nnameserver 10.0.0.1\nsearch a.example b.example\noptions ndots:1\n");
        let job = Dns { servers: vec!["127.0.0.1".to_owned()], ..Dns::default() };
        assert_eq!(job.render(&system), "nameserver 127.0.0.1\nsearch a.example b.example\noptions ndots:1\n");
        assert!(Dns::default().is_unset());
        assert_eq!(
            Dns::default().render(&system),
            "nameserver 10.0.0.1\nsearch a.example b.example\noptions ndots:1\n"
        );
    }
}
