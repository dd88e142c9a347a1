// Package nodecache keeps the credentials that a node may pull with in files: the agent writes them, and imps-credprovider, which
// the kubelet starts for a pull, reads them.
//
// A folder holds one folder for each scope: what every Pod of the node may use, or the Pods of one namespace. In it there is
// one record for each host that there are credentials for, so that the time of an answer does not grow with their number, and
// an index, without which the scope is not known. Keys whose host has globs are in the record of its shape: *.r.example is that
// of a*.r.example, too. The index lists which labels are globs in any shape, so that a reader tries those shapes alone.
//
//	/run/imps/lock
//	/run/imps/node/index
//	/run/imps/node/h-<SHA-256 of host>
//	/run/imps/node/g-<SHA-256 of shape>
//	/run/imps/ns-<namespace>/index
//	...
//
// Only the standard library is used: the provider has to start fast.
package nodecache

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// DefaultDir is where the records are, on a tmpfs: they do not outlive the machine's start.
const DefaultDir = "/run/imps"

// Limits of what is written, and read.
const (
	// MaxRecordBytes is how large a file may be.
	MaxRecordBytes = 1 << 20
	// maxKeyBytes is how long a key may be.
	maxKeyBytes = 1024
)

// versions are those of the format that a reader takes; the last one is written.
var versions = []string{"1"}

// Scope says who may use credentials.
type Scope struct {
	// Namespace is whose Pods may; empty for every Pod of the node.
	Namespace string
}

// Node is the scope of every Pod of the node.
var Node = Scope{}

// InNamespace is the scope of the Pods of a namespace.
func InNamespace(namespace string) Scope { return Scope{Namespace: namespace} }

// folder is the name of a scope's folder. A namespace is a DNS label, so that none is a path.
func (s Scope) folder() (string, error) {
	if s.Namespace == "" {
		return "node", nil
	}
	if len(s.Namespace) > 63 || strings.Trim(s.Namespace, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return "", errors.New("the scope is no namespace")
	}
	return "ns-" + s.Namespace, nil
}

// Secret is what holds a credential, and shows it on demand only.
type Secret interface{ Reveal() string }

// Entry is a credential.
type Entry struct {
	// Key is what it is for, in the form that a kubelet brings keys of docker configs to: host[:port][/path], in which the
	// labels of the host may be globs (path.Match). One with an escape (%) is not taken.
	Key                string
	Username, Password Secret
	// Expires is when it expires; zero where it does not.
	Expires time.Time
}

// group is the name of the file that holds the entries of a host, or of all hosts with globs of one shape.
type group string

// groupOf returns the group of a key, and the mask of its host, which is empty for one without globs. A key that kubelets would
// read otherwise than by its host and its path has none.
func groupOf(key string) (g group, mask string, err error) {
	host, _, _ := strings.Cut(key, "/")
	if host == "" || len(key) > maxKeyBytes || strings.ContainsAny(key, "?#@% \t\r\n\x00") || strings.Contains(key, "://") {
		return "", "", errors.New("a key is not of the form host[:port][/path], or too long")
	}
	if !strings.ContainsAny(host, globbing) {
		return literal(host), "", nil
	}
	name, _ := splitPort(host)
	var m strings.Builder
	for label := range strings.SplitSeq(name, ".") {
		if strings.ContainsAny(label, globbing) {
			m.WriteByte('*')
		} else {
			m.WriteByte('-')
		}
	}
	return shape(host, m.String()), m.String(), nil
}

// globbing are the characters that make a label a glob (path.Match); the fourth, "?", begins the query of a URL.
const globbing = `*[\`

// literal is the group of a host without globs.
func literal(host string) group {
	sum := sha256.Sum256([]byte(host))
	return group("h-" + hex.EncodeToString(sum[:]))
}

// shape is the group of all keys whose globs, in the labels that the mask marks with "*", may match a host; empty where the host
// has another number of labels.
func shape(host, mask string) group {
	name, port := splitPort(host)
	labels := strings.Split(name, ".")
	if len(labels) != len(mask) {
		return ""
	}
	for i := range labels {
		if mask[i] == '*' {
			labels[i] = "*"
		}
	}
	sum := sha256.Sum256([]byte(strings.Join(labels, ".") + ":" + port))
	return group("g-" + hex.EncodeToString(sum[:]))
}

// splitPort splits a host as kubelets do: with net.SplitHostPort, and what that refuses is all name. Package net itself would
// double the time that the provider takes to start.
func splitPort(host string) (name, port string) {
	colon := strings.LastIndexByte(host, ':')
	if colon < 0 {
		return host, ""
	}
	name, port = host[:colon], host[colon+1:]
	rest := name
	if inner, ok := strings.CutPrefix(name, "["); ok {
		// An IPv6 address ends right before the port.
		if inner, ok = strings.CutSuffix(inner, "]"); !ok || strings.Contains(inner, "]") {
			return host, ""
		}
		name, rest = inner, inner
	} else if strings.Contains(name, ":") {
		return host, ""
	}
	if strings.ContainsAny(rest, "[]") || strings.ContainsAny(port, "[]") {
		return host, ""
	}
	return name, port
}

// record is the content of a file.
type record struct {
	// Group says what it is for, and the Scope of an index whose: one that was moved is none. The same records of several scopes are
	// one file.
	Scope   string         `json:"scope,omitempty"`
	Group   group          `json:"group"`
	Written instant        `json:"written"`
	Entries []writtenEntry `json:"entries,omitempty"`
	// Of an index: which labels of hosts are globs, and what changes whenever a group comes or goes.
	Masks      []string `json:"masks,omitempty"`
	Generation string   `json:"generation,omitempty"`
}

// indexGroup is the group of the index.
const indexGroup group = "index"

type writtenEntry struct {
	Key      string     `json:"key"`
	Username string     `json:"username"`
	Password string     `json:"password"`
	Expires  *time.Time `json:"expires,omitempty"`
}

const magic = "imps-nodecache"

// encode returns a file: a line with the version and the checksum of the rest, and the record.
func encode(r record) ([]byte, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, errors.New("a record cannot be encoded") // the error might quote it
	}
	sum := sha256.Sum256(body)
	raw := fmt.Appendf(nil, "%s %s %s\n", magic, versions[len(versions)-1], hex.EncodeToString(sum[:]))
	if raw = append(raw, body...); len(raw) > MaxRecordBytes {
		return nil, errSize
	}
	return raw, nil
}

// Errors of records. None quotes one.
var (
	errFormat  = errors.New("it is no record")
	errVersion = errors.New("it is a record of another version")
	errSum     = errors.New("it is not as it was written")
	errPlace   = errors.New("it is the record of something else")
	errSize    = errors.New("it is too large")
)

// decode is the inverse of encode, for the record of a group of a scope.
func decode(raw []byte, scope string, g group) (record, error) {
	head, body, ok := bytes.Cut(raw, []byte("\n"))
	fields := strings.Split(string(head[:min(len(head), 200)]), " ")
	if !ok || len(fields) != 3 || fields[0] != magic {
		return record{}, errFormat
	}
	if !slices.Contains(versions, fields[1]) {
		return record{}, errVersion
	}
	if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != fields[2] {
		return record{}, errSum
	}
	var r record
	if json.Unmarshal(body, &r) != nil {
		return record{}, errFormat
	}
	if r.Scope != scope || r.Group != g {
		return record{}, errPlace
	}
	return r, nil
}
