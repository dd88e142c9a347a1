package registry

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"regexp"
	"slices"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imps-node/imps/test/cluster/cluster"
)

// Hosts is a registry that has many hosts, each with a guard and an address of its own. Every repository of every host
// holds the image of cluster.PauseImage, tagged v1, so that a test can pull a name that no node has seen before.
type Hosts struct {
	distribution *distribution

	mu    sync.Mutex
	hosts map[string]*Host
}

// Host is one of them. At first, nobody gets in.
type Host struct {
	// Address is where it listens, on loopback.
	Address string

	server *httptest.Server

	mu        sync.Mutex
	passwords map[string][]string
	guard     func(http.Handler) http.Handler
	counts    Counts
}

// Counts are requests for the image itself, which come first in a pull; containerd makes one or two of them without
// credentials before it sends any.
type Counts struct {
	// Pulled were answered.
	Pulled int
	// Anonymous were refused and had no credentials, Refused those that had some.
	Anonymous, Refused int
}

// StartHosts starts a registry without any hosts. It ends with Stop, and with the control plane at the latest. binary is
// that of Build; dir holds its configuration.
func StartHosts(ctx context.Context, control *cluster.Cluster, binary, dir string) (*Hosts, error) {
	image, err := cluster.PauseImage(ctx)
	if err != nil {
		return nil, err
	}
	return StartHostsOf(ctx, control, binary, dir, image)
}

// StartHostsOf does the same for another image.
func StartHostsOf(ctx context.Context, control *cluster.Cluster, binary, dir string, image v1.Image) (*Hosts, error) {
	d, err := serve(ctx, control, binary, dir, image)
	if err != nil {
		return nil, err
	}
	return &Hosts{distribution: d, hosts: map[string]*Host{}}, nil
}

// Host returns the host of a name, such as registry.example:5000, which is only told apart by it: requests come to its
// address.
func (r *Hosts) Host(name string) *Host {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.hosts[name]; h != nil {
		return h
	}
	h := &Host{passwords: map[string][]string{}}
	h.server = httptest.NewServer(h.count(r.anyRepository()))
	h.Address = h.server.Listener.Addr().String()
	r.hosts[name] = h
	return h
}

// Addresses has the address of every host, for cluster.NodeConfig.
func (r *Hosts) Addresses() map[string]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	addresses := map[string]string{}
	for name, h := range r.hosts {
		addresses[name] = h.Address
	}
	return addresses
}

// Stop ends it.
func (r *Hosts) Stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.hosts {
		h.server.Close()
	}
	r.distribution.stop()
}

var repository = regexp.MustCompile(`^/v2/.+/(manifests|blobs)/`)

// anyRepository reads the one repository there is, whichever is asked for.
func (r *Hosts) anyRepository() http.Handler {
	app, _, _ := strings.Cut(pushed, ":")
	return &httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) {
		p.SetURL(r.distribution.url)
		p.Out.URL.Path = repository.ReplaceAllString(p.Out.URL.Path, "/v2/"+app+"/$1/")
	}}
}

// Allow lets in a user with any of these passwords, instead of any that the user had before.
func (h *Host) Allow(user string, passwords ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.passwords[user] = passwords
}

// Revoke lets a user in no more.
func (h *Host) Revoke(user string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.passwords, user)
}

// Guard has something else than Allow decide who gets in, for instance that of fakeaws.
func (h *Host) Guard(guard func(http.Handler) http.Handler) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.guard = guard
}

// Open lets everybody in.
func (h *Host) Open() {
	h.Guard(func(next http.Handler) http.Handler { return next })
}

// Counts returns what was asked for since the start.
func (h *Host) Counts() Counts {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.counts
}

// byTag is the path of a request for an image by its tag.
var byTag = regexp.MustCompile(`^/v2/.+/manifests/[^:]+$`)

// count has the guard decide on a request, and counts how it did, before the client knows.
func (h *Host) count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		guard := h.guard
		h.mu.Unlock()
		if guard == nil {
			guard = h.basicAuth
		}
		counted := func(count *int) {
			if byTag.MatchString(r.URL.Path) {
				h.mu.Lock()
				defer h.mu.Unlock()
				*count++
			}
		}
		passed := false
		guard(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			passed = true
			counted(&h.counts.Pulled)
			next.ServeHTTP(w, r)
		})).ServeHTTP(w, r)
		switch {
		case passed:
		case r.Header.Get("Authorization") == "":
			counted(&h.counts.Anonymous)
		default:
			counted(&h.counts.Refused)
		}
	})
}

func (h *Host) basicAuth(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		h.mu.Lock()
		good := slices.Contains(h.passwords[user], password)
		h.mu.Unlock()
		if !good {
			w.Header().Set("Www-Authenticate", `Basic realm="test"`)
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
			return
		}
		next.ServeHTTP(w, r)
	})
}
