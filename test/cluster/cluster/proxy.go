package cluster

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/rest"
)

// AtOnce stands in a Fault where 0 would mean that nothing is asked for.
const AtOnce = -1

// errBroken is what the proxy does instead of going on; no client gets to see it.
var errBroken = errors.New("broken on purpose")

// Proxy stands between clients and the API server, and does to their requests
// what a test injects. Everything else passes at once and unchanged. A client
// sees a broken HTTP/2 stream where the API server itself cannot be reached.
type Proxy struct {
	cluster *Cluster
	url     string
	server  *http.Server
	served  chan error // what the server's end returned

	front, back connections

	mu         sync.Mutex
	closed     bool
	requests   sync.WaitGroup
	injections []*Injection
	// upstream has a connection pool for each client certificate, by its subject.
	upstream map[string]*http.Transport
}

// Request is what a request asks for, in the words of the audit log, which
// takes the name of what is created from the answer: here it is empty.
type Request struct {
	// Verb is Kubernetes' own: get, list, watch, create, update, patch, delete,
	// deletecollection; for requests outside the resources, HTTP's in lower case.
	Verb        string
	Group       string
	Resource    string
	Subresource string
	Namespace   string
	Name        string
	UserAgent   string
	// HTTP is the request as it came; its body is not to be touched.
	HTTP *http.Request
}

// Fault says what happens to which requests. One with nothing below Times
// only counts. Counts of bytes are of those on the wire, which may be
// compressed.
type Fault struct {
	Match func(Request) bool // nil: every request
	Times int                // how many requests it hits; 0: all

	// At most one of these.

	Latency     time.Duration // passes between the request's arrival and its being passed on
	ResetBefore bool          // the stream breaks, and the server never sees the request
	ResetAfter  bool          // the server answers, and the stream breaks before the client sees anything of it
	Status      *Status       // answered by the proxy; the server never sees the request
	// Truncate breaks the stream after so many bytes of the answer's body, or AtOnce.
	Truncate int
	// TruncateEvents breaks the stream of a watch after so many events, or AtOnce.
	TruncateEvents int
	// StallAfter keeps the rest of the answer's body back after so many bytes, or
	// AtOnce, without an end.
	StallAfter int
	Hold       bool // the request waits before it is passed on: see Injection.Held
	HoldAfter  bool // the server has answered, and the answer waits: see Injection.Held
}

// Status is an answer.
type Status struct {
	Code   int
	Header http.Header
	Body   []byte
}

// Failure returns an answer with a metav1.Status as the API server gives it.
func Failure(code int, reason metav1.StatusReason, message string) *Status {
	body, err := json.Marshal(&metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
		Status:   metav1.StatusFailure, Code: int32(code), Reason: reason, Message: message, //nolint:gosec // an HTTP status
	})
	if err != nil {
		panic(err) // strings and a number
	}
	return &Status{Code: code, Header: http.Header{"Content-Type": {"application/json"}}, Body: body}
}

// Injection is a Fault in force.
type Injection struct {
	fault   Fault
	proxy   *Proxy
	hits    int // guarded by Proxy.mu
	held    chan *Held
	remove  func()
	removed chan struct{}
}

// Held is a request, or its answer, that waits.
type Held struct {
	Request Request

	once    sync.Once
	decided chan error
}

// Release lets it go on.
func (h *Held) Release() { h.decide(nil) }

// Drop breaks its stream.
func (h *Held) Drop() { h.decide(errBroken) }

func (h *Held) decide(err error) {
	h.once.Do(func() { h.decided <- err })
}

// Proxy starts a proxy that listens on loopback with a certificate of the
// cluster's authority. The context bounds the start only; the caller closes
// the proxy before it stops the cluster.
func (c *Cluster) Proxy(ctx context.Context) (*Proxy, error) {
	serving, err := c.authority.serving("proxy")
	if err != nil {
		return nil, err
	}
	certificate, err := tls.X509KeyPair(serving.cert, serving.key)
	if err != nil {
		return nil, fmt.Errorf("read the proxy's certificate: %w", err)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the proxy: %w", err)
	}
	p := &Proxy{
		cluster: c, url: "https://" + listener.Addr().String(), served: make(chan error, 1),
		upstream: map[string]*http.Transport{},
	}
	silent := log.New(io.Discard, "", 0)
	target, err := url.Parse(c.url)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("parse the API server's address: %w", err), listener.Close())
	}
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.URL.RawQuery = r.In.URL.RawQuery // also what Go would not parse
		},
		Transport:     roundTripper(p.roundTrip),
		FlushInterval: -1,
		ErrorLog:      silent,
		ErrorHandler:  func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	authorities := c.authority.clientTLS().RootCAs
	p.server = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !p.begin() {
				panic(http.ErrAbortHandler)
			}
			defer p.requests.Done()
			forward.ServeHTTP(headerFirst{w}, r)
		}),
		TLSConfig: &tls.Config{
			Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12,
			ClientCAs: authorities, ClientAuth: tls.VerifyClientCertIfGiven,
		},
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 1000}, // as the API server
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          silent,
	}
	go func() { p.served <- p.server.ServeTLS(p.front.listener(listener), "", "") }()
	return p, nil
}

// Config returns a config of the same identity, bearer token or certificate of
// the cluster's authority, that connects through the proxy.
func (p *Proxy) Config(config *rest.Config) *rest.Config {
	config = rest.CopyConfig(config)
	config.Host = p.url
	return config
}

// Close breaks everything that is under way, also what is stalled or held, and
// returns when it has ended. Calls after the first do nothing.
func (p *Proxy) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	err := p.server.Close()
	if serveErr := <-p.served; !errors.Is(serveErr, http.ErrServerClosed) {
		err = errors.Join(err, serveErr)
	}
	p.front.breakAll()
	p.back.breakAll()
	p.requests.Wait()
	p.back.breakAll() // what was dialled meanwhile
	for _, transport := range p.upstream {
		transport.CloseIdleConnections()
	}
	if err != nil {
		return fmt.Errorf("close the proxy: %w", err)
	}
	return nil
}

// BreakAll breaks all connections of clients at once, as a load balancer that
// goes away. New ones are accepted.
func (p *Proxy) BreakAll() {
	p.front.breakAll()
}

// Inject puts a fault in force until it is removed, or has hit as many
// requests as it says. Where several match a request, only the one injected
// first hits it.
func (p *Proxy) Inject(f Fault) *Injection {
	i := &Injection{fault: f, proxy: p, held: make(chan *Held), removed: make(chan struct{})}
	i.remove = sync.OnceFunc(func() { close(i.removed) })
	p.mu.Lock()
	defer p.mu.Unlock()
	p.injections = append(p.injections, i)
	return i
}

// Remove ends the fault: requests that it delays, holds or stalls go on. What
// was handed out by Held and dropped stays dropped.
func (i *Injection) Remove() {
	i.proxy.mu.Lock()
	for n, other := range i.proxy.injections {
		if other == i {
			i.proxy.injections = append(i.proxy.injections[:n:n], i.proxy.injections[n+1:]...)
			break
		}
	}
	i.proxy.mu.Unlock()
	i.remove()
}

// Hits returns how many requests the fault has hit.
func (i *Injection) Hits() int {
	i.proxy.mu.Lock()
	defer i.proxy.mu.Unlock()
	return i.hits
}

// Held hands out each request that the fault holds, once. Those that nobody
// takes, or decides about, wait until the fault is removed.
func (i *Injection) Held() <-chan *Held {
	return i.held
}

// begin counts a request that Close has to wait for.
func (p *Proxy) begin() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.requests.Add(1)
	return true
}

// hit returns the fault that a request meets, if any.
func (p *Proxy) hit(r Request) *Injection {
	p.mu.Lock()
	candidates := p.injections
	p.mu.Unlock()
	for _, i := range candidates {
		// Not under the lock: a test's Match may ask for Hits.
		if i.fault.Match != nil && !i.fault.Match(r) {
			continue
		}
		if i.take() {
			return i
		}
	}
	return nil
}

func (i *Injection) take() bool {
	i.proxy.mu.Lock()
	defer i.proxy.mu.Unlock()
	select {
	case <-i.removed:
		return false
	default:
	}
	if i.fault.Times > 0 && i.hits == i.fault.Times {
		return false
	}
	i.hits++
	return true
}

// headerFirst sends the header of an answer at once, so that what breaks later
// breaks in its body.
type headerFirst struct {
	http.ResponseWriter
}

// WriteHeader implements http.ResponseWriter.
func (w headerFirst) WriteHeader(code int) {
	w.ResponseWriter.WriteHeader(code)
	// A client that is gone shows in the next write.
	_ = http.NewResponseController(w.ResponseWriter).Flush()
}

// Unwrap is for http.ResponseController.
func (w headerFirst) Unwrap() http.ResponseWriter { return w.ResponseWriter }

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// roundTrip passes a request on, and does to it and its answer what is
// injected. An error breaks the client's stream.
func (p *Proxy) roundTrip(out *http.Request) (*http.Response, error) {
	upstream, err := p.upstreamOf(out)
	if err != nil {
		return nil, err
	}
	request := parseRequest(out)
	injection := p.hit(request)
	if injection == nil {
		return upstream.RoundTrip(out)
	}
	if err := injection.before(request); err != nil {
		return nil, err
	}
	if status := injection.fault.Status; status != nil {
		return &http.Response{
			StatusCode: status.Code, Header: status.Header.Clone(), Request: out,
			Proto: "HTTP/2.0", ProtoMajor: 2,
			Body: io.NopCloser(bytes.NewReader(status.Body)), ContentLength: int64(len(status.Body)),
		}, nil
	}
	answer, err := upstream.RoundTrip(out)
	if err != nil {
		return nil, err
	}
	if err := injection.after(request, answer); err != nil {
		return nil, errors.Join(err, answer.Body.Close())
	}
	return answer, nil
}

// before does what a fault does to a request that the server has not seen.
func (i *Injection) before(r Request) error {
	switch {
	case i.fault.ResetBefore:
		return errBroken
	case i.fault.Hold:
		return i.hold(r)
	case i.fault.Latency > 0:
		timer := time.NewTimer(i.fault.Latency)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-i.removed:
		case <-r.HTTP.Context().Done():
			return errBroken
		}
	}
	return nil
}

// after does what a fault does to an answer.
func (i *Injection) after(r Request, answer *http.Response) error {
	switch {
	case i.fault.ResetAfter:
		return errBroken
	case i.fault.HoldAfter:
		return i.hold(r)
	case i.fault.Truncate != 0:
		answer.Body = &cutBody{ReadCloser: answer.Body, left: max(i.fault.Truncate, 0), cut: func() error { return errBroken }}
	case i.fault.StallAfter != 0:
		answer.Body = &cutBody{ReadCloser: answer.Body, left: max(i.fault.StallAfter, 0), cut: func() error {
			select {
			case <-i.removed:
				return nil
			case <-r.HTTP.Context().Done():
				return errBroken
			}
		}}
	case i.fault.TruncateEvents != 0:
		answer.Body = &eventsBody{
			Closer: answer.Body, source: bufio.NewReader(answer.Body), left: max(i.fault.TruncateEvents, 0),
			framed: strings.Contains(answer.Header.Get("Content-Type"), "protobuf"),
		}
	}
	return nil
}

func (i *Injection) hold(r Request) error {
	held := &Held{Request: r, decided: make(chan error, 1)}
	select {
	case i.held <- held:
	case <-i.removed:
		return nil
	case <-r.HTTP.Context().Done():
		return errBroken
	}
	select {
	case err := <-held.decided:
		return err
	case <-r.HTTP.Context().Done():
		return errBroken
	case <-i.removed:
	}
	select {
	case err := <-held.decided:
		return err
	default:
		return nil
	}
}

// upstreamOf returns the connections to the API server that speak for the
// client: a token stands in the request itself, while a certificate has to be
// made again, since only the client has its key.
func (p *Proxy) upstreamOf(r *http.Request) (*http.Transport, error) {
	var subject string
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		subject = r.TLS.PeerCertificates[0].Subject.String()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if transport := p.upstream[subject]; transport != nil {
		return transport, nil
	}
	config := p.cluster.authority.clientTLS()
	if subject != "" {
		name := r.TLS.PeerCertificates[0].Subject
		user, err := p.cluster.authority.user(name.CommonName, name.Organization)
		if err != nil {
			return nil, err
		}
		certificate, err := tls.X509KeyPair(user.cert, user.key)
		if err != nil {
			return nil, fmt.Errorf("read the certificate of %q: %w", name.CommonName, err)
		}
		config.Certificates = []tls.Certificate{certificate}
	}
	transport := &http.Transport{
		TLSClientConfig: config, ForceAttemptHTTP2: true, DisableCompression: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return p.back.add(conn), nil
		},
	}
	p.upstream[subject] = transport
	return transport, nil
}

// cutBody lets so many bytes pass, then asks cut whether the rest may.
type cutBody struct {
	io.ReadCloser
	left int
	cut  func() error // nil once it has let the rest pass
}

func (b *cutBody) Read(into []byte) (int, error) {
	if b.cut != nil && b.left == 0 {
		if err := b.cut(); err != nil {
			return 0, err
		}
		b.cut = nil
	}
	if b.cut == nil {
		return b.ReadCloser.Read(into)
	}
	n, err := b.ReadCloser.Read(into[:min(len(into), b.left)])
	b.left -= n
	return n, err
}

// eventsBody lets so many events of a watch pass, then breaks.
type eventsBody struct {
	io.Closer
	source *bufio.Reader
	framed bool // with a length before each event, as protobuf; else a line each, as JSON
	left   int
	event  []byte // what is still to be read of the current one
}

func (b *eventsBody) Read(into []byte) (int, error) {
	if len(b.event) == 0 {
		if b.left == 0 {
			return 0, errBroken
		}
		b.left--
		var err error
		if b.event, err = b.next(); err != nil {
			return 0, err
		}
	}
	n := copy(into, b.event)
	b.event = b.event[n:]
	return n, nil
}

func (b *eventsBody) next() ([]byte, error) {
	if !b.framed {
		return b.source.ReadBytes('\n')
	}
	const prefix = 4
	length, err := b.source.Peek(prefix)
	if err != nil {
		return nil, err
	}
	event := make([]byte, prefix+binary.BigEndian.Uint32(length))
	_, err = io.ReadFull(b.source, event)
	return event, err
}

// parseRequest reads a path as the API server does.
func parseRequest(r *http.Request) Request {
	parsed := Request{Verb: strings.ToLower(r.Method), UserAgent: r.UserAgent(), HTTP: r}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case len(parts) > 2 && parts[0] == "api":
		parts = parts[2:]
	case len(parts) > 3 && parts[0] == "apis":
		parsed.Group, parts = parts[1], parts[3:]
	default:
		return parsed
	}
	if parts[0] == "namespaces" && len(parts) > 1 {
		// A Namespace counts as being in itself.
		parsed.Namespace = parts[1]
		if len(parts) > 2 && parts[2] != "status" && parts[2] != "finalize" {
			parts = parts[2:]
		}
	}
	parsed.Resource = parts[0]
	if len(parts) > 1 {
		parsed.Name = parts[1]
	}
	if len(parts) > 2 {
		parsed.Subresource = parts[2]
	}
	query := r.URL.Query()
	one := parsed.Name != ""
	switch {
	case r.Method == http.MethodPost:
		parsed.Verb = "create"
	case r.Method == http.MethodPut:
		parsed.Verb = "update"
	case r.Method == http.MethodGet && !one && (query.Get("watch") == "true" || query.Get("watch") == "1"):
		parsed.Verb = "watch"
	case r.Method == http.MethodGet && !one:
		parsed.Verb = "list"
	case r.Method == http.MethodDelete && !one:
		parsed.Verb = "deletecollection"
	}
	if selector, err := fields.ParseSelector(query.Get("fieldSelector")); err == nil && !one {
		parsed.Name, _ = selector.RequiresExactMatch("metadata.name")
	}
	return parsed
}

// connections are those that can be broken at any time.
type connections struct {
	mu   sync.Mutex
	open map[*connection]struct{}
}

type connection struct {
	net.Conn
	owner *connections
}

func (c *connections) add(conn net.Conn) net.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		c.open = map[*connection]struct{}{}
	}
	added := &connection{Conn: conn, owner: c}
	c.open[added] = struct{}{}
	return added
}

func (c *connections) breakAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for connection := range c.open {
		// The other side gets a reset, and the owner an error with its next
		// read, on which it closes the connection once more.
		if tcp, ok := connection.Conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = connection.Conn.Close()
	}
	clear(c.open)
}

// Close implements net.Conn.
func (c *connection) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.open, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}

type trackingListener struct {
	net.Listener
	accepted *connections
}

func (c *connections) listener(l net.Listener) net.Listener {
	return trackingListener{Listener: l, accepted: c}
}

// Accept implements net.Listener.
func (l trackingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.accepted.add(conn), nil
}
