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

// Lookup returns the credentials of a scope for the registry of an image, as a kubelet names it: host[:port]/path. They are for
// all repositories of that registry, so that the answer holds for each. What expires within margin is left out. ErrUnknown
// says that there is no index; any other error, that something is not as it should be.
func (r *Reader) Lookup(scope Scope, image string, margin time.Duration) ([]Credential, error) {
	host, repository, ok := strings.Cut(image, "/")
	if !ok || host == "" || repository == "" || len(image) > maxKeyBytes {
		return nil, errors.New("it is no image with a registry")
	}
	folder, err := scope.folder()
	if err != nil {
		return nil, err
	}
	now, err := r.clock()
	if err != nil {
		return nil, errors.New("the time is not known")
	}
	root, err := openFolder(-1, r.dir)
	if errors.Is(err, syscall.ENOENT) {
		return nil, ErrUnknown
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = syscall.Close(root) }()
	dir, err := openFolder(root, folder)
	if errors.Is(err, syscall.ENOENT) {
		return nil, ErrUnknown
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = syscall.Close(dir) }()
	if _, err := read(dir, folder, indexGroup); errors.Is(err, syscall.ENOENT) {
		return nil, ErrUnknown
	} else if err != nil {
		return nil, err
	}
	name, port := splitPort(host)
	groups := []group{literal(host), globs(name, port)}
	if host == hub || !strings.ContainsAny(host, ".:") {
		groups = append(groups, literal(hubIndex))
	}
	var found []Credential
	for _, g := range groups {
		record, err := read(dir, folder, g)
		if errors.Is(err, syscall.ENOENT) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range record.Entries {
			if !matchesHost(e.Key, host) && g != literal(hubIndex) {
				continue
			}
			c := Credential{key: e.Key, username: e.Username, password: e.Password}
			if e.Expires != nil {
				c.left, c.expires = remaining(*e.Expires, record.Written, now), true
				if c.left <= margin {
					continue
				}
			}
			found = append(found, c)
		}
	}
	return found, nil
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

// read reads a record.
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
		return record{}, errors.New("it is too large")
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
