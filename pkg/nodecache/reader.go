package nodecache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"syscall"
	"time"
)

// ErrUnknown says that there is no index of a scope: whether there are credentials is not known (yet).
var ErrUnknown = errors.New("the scope is not known")

// ErrQuestion says that no record could be the answer: the image has no registry, or the scope is no namespace.
var ErrQuestion = errors.New("it is no image with a registry, or no namespace")

// Reader reads what a Writer has written, and trusts nothing: whatever is not exactly as a Writer leaves it counts as not there.
type Reader struct {
	dir   string
	clock clock
}

// NewReader returns a Reader of a folder.
func NewReader(dir string) *Reader { return &Reader{dir: dir, clock: systemClock} }

// Credential is what was found. It does not print.
type Credential struct {
	key, username, password string
	left                    time.Duration
	expires                 bool
}

// Key is what it is for.
func (c Credential) Key() string { return c.key }

// Reveal returns the credential itself.
func (c Credential) Reveal() (username, password string) { return c.username, c.password }

// Left is how long it is good; false where it does not expire.
func (c Credential) Left() (time.Duration, bool) { return c.left, c.expires }

// Format prints what it is for, and nothing else, whatever the verb.
func (c Credential) Format(state fmt.State, _ rune) {
	_, _ = io.WriteString(state, "credential for "+c.key)
}

// The hosts of Docker Hub: images are of the first, docker login writes the second, and a kubelet turns to that where nothing
// else matches.
const hub, hubIndex = "docker.io", "index.docker.io"

// Answer is what a scope has for an image.
type Answer struct {
	// Credentials are all of the image's registry, so that they are the answer for every repository of it.
	Credentials []Credential
	// Matches: one of them is for the image itself.
	Matches bool
	// Withheld: there are others, which expire within the margin, have expired, or cannot be read.
	Withheld bool
}

// Known reports whether there is an index of a scope, whatever it is worth.
func (r *Reader) Known(scope Scope) bool {
	folder, err := scope.folder()
	if err != nil {
		return false
	}
	_, err = os.Lstat(path.Join(r.dir, folder, string(indexGroup)))
	return err == nil
}

// Lookup returns what a scope has for an image, as a kubelet names it: host[:port]/path. What expires within margin is withheld.
// ErrUnknown says that there is no index; any other error, that something is not as it should be.
func (r *Reader) Lookup(scope Scope, image string, margin time.Duration) (Answer, error) {
	host, repository, ok := strings.Cut(image, "/")
	if !ok || host == "" || repository == "" || len(image) > maxKeyBytes {
		return Answer{}, ErrQuestion
	}
	folder, err := scope.folder()
	if err != nil {
		return Answer{}, ErrQuestion
	}
	now, err := r.clock()
	if err != nil {
		return Answer{}, errors.New("the time is not known")
	}
	root, err := openFolder(-1, r.dir)
	if err != nil {
		return Answer{}, unknown(err)
	}
	defer func() { _ = syscall.Close(root) }()
	dir, err := openFolder(root, folder)
	if err != nil {
		return Answer{}, unknown(err)
	}
	defer func() { _ = syscall.Close(dir) }()
	// A key that moves from one record to another is in neither, for whoever reads the new one before it is there and the old one
	// when it is gone. The index tells, and no writer is that fast for long.
	var answer Answer
	for seen := "-"; ; {
		index, err := read(dir, folder, indexGroup)
		if err != nil {
			return Answer{}, unknown(err)
		}
		if index.Generation == seen {
			return answer, nil
		}
		answer, err = find(dir, image, index.Masks, now, margin)
		if err != nil || answer.Matches {
			return answer, err
		}
		seen = index.Generation
	}
}

// unknown is ErrUnknown in place of an error that says that something is not there.
func unknown(err error) error {
	if errors.Is(err, syscall.ENOENT) {
		return ErrUnknown
	}
	return err
}

// find reads the records in which there may be credentials for an image.
func find(dir int, image string, masks []string, now instant, margin time.Duration) (Answer, error) {
	host, _, _ := strings.Cut(image, "/")
	groups := []group{literal(host)}
	for _, mask := range masks {
		if g := shape(host, mask); g != "" {
			groups = append(groups, g)
		}
	}
	if host == hub || !strings.ContainsAny(host, ".:") {
		groups = append(groups, literal(hubIndex))
	}
	var answer Answer
	var failed error
	for _, g := range groups {
		record, err := read(dir, "", g)
		if errors.Is(err, syscall.ENOENT) {
			continue
		}
		if err != nil {
			failed = err
			continue
		}
		for _, e := range record.Entries {
			fallback := g == literal(hubIndex) && e.Key == hubIndex
			if !matchesHost(e.Key, host) && !fallback {
				continue
			}
			c := Credential{key: e.Key, username: e.Username, password: e.Password}
			if e.Expires != nil {
				c.left, c.expires = remaining(*e.Expires, record.Written, now), true
				if c.left <= margin {
					answer.Withheld = true
					continue
				}
			}
			answer.Credentials = append(answer.Credentials, c)
			answer.Matches = answer.Matches || fallback || matchesPath(e.Key, image)
		}
	}
	if failed != nil && !answer.Matches {
		return Answer{}, failed
	}
	answer.Withheld = answer.Withheld || failed != nil
	return answer, nil
}

// matchesPath reports whether the path of a key is one for an image, given that its host is: a plain prefix (urlsMatch in
// pkg/credentialprovider/keyring.go of Kubernetes).
func matchesPath(key, image string) bool {
	_, pattern, _ := strings.Cut(key, "/")
	_, repository, _ := strings.Cut(image, "/")
	return strings.HasPrefix(repository, pattern)
}

// matchesHost reports whether the host of a key matches one, as in pkg/credentialprovider/keyring.go of Kubernetes.
func matchesHost(key, host string) bool {
	pattern, _, _ := strings.Cut(key, "/")
	patternName, patternPort := splitPort(pattern)
	name, port := splitPort(host)
	globs, labels := strings.Split(patternName, "."), strings.Split(name, ".")
	if patternPort != port || len(globs) != len(labels) {
		return false
	}
	for i := range globs {
		if ok, err := path.Match(globs[i], labels[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

// openFolder opens a folder that is ours alone, by its path, or by its name in another.
func openFolder(parent int, name string) (int, error) {
	const flags = syscall.O_RDONLY | syscall.O_DIRECTORY | syscall.O_NOFOLLOW | syscall.O_CLOEXEC
	var fd int
	var err error
	if parent < 0 {
		fd, err = syscall.Open(name, flags, 0)
	} else {
		fd, err = syscall.Openat(parent, name, flags, 0)
	}
	if err != nil {
		return -1, fmt.Errorf("open the folder: %w", err)
	}
	var stat syscall.Stat_t
	if err = syscall.Fstat(fd, &stat); err == nil {
		err = ours(&stat, syscall.S_IFDIR)
	}
	if err != nil {
		_ = syscall.Close(fd)
		return -1, err
	}
	return fd, nil
}

// ours returns what is wrong with the kind, the owner or the mode of a file.
func ours(stat *syscall.Stat_t, kind uint32) error {
	switch {
	case stat.Mode&syscall.S_IFMT != kind:
		return errors.New("it is not the kind of file that it should be")
	case int(stat.Uid) != os.Geteuid():
		return errors.New("it has another owner")
	case stat.Mode&0o077 != 0:
		return errors.New("others may use it")
	default:
		return nil
	}
}

// read reads a record; scope is that of an index.
func read(dir int, scope string, g group) (record, error) {
	// Not blocking, so that a FIFO does not hold the reader.
	fd, err := syscall.Openat(dir, string(g), syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return record{}, fmt.Errorf("open a record: %w", err)
	}
	defer func() { _ = syscall.Close(fd) }()
	var stat syscall.Stat_t
	if err := syscall.Fstat(fd, &stat); err != nil {
		return record{}, errFormat
	}
	if err := ours(&stat, syscall.S_IFREG); err != nil {
		return record{}, err
	}
	if stat.Size > MaxRecordBytes {
		return record{}, errSize
	}
	raw := make([]byte, stat.Size)
	for n := 0; n < len(raw); {
		m, err := syscall.Read(fd, raw[n:])
		if err == syscall.EINTR {
			continue
		}
		if err != nil || m == 0 {
			return record{}, errFormat
		}
		n += m
	}
	return decode(raw, scope, g)
}
