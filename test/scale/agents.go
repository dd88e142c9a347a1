package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authenticationv1client "k8s.io/client-go/kubernetes/typed/authentication/v1"
	"k8s.io/client-go/rest"

	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/pkg/sync/node"
	"github.com/imps-node/imps/test/imps"
)

// agent is the node duty of one node.
type agent struct {
	node   string
	config *rest.Config // with a token of its own
	line   line
	log    *slog.Logger

	running *running // nil where it does not run
}

type running struct {
	ready  func() error
	cancel context.CancelFunc
	done   chan error
}

// start starts it as imps-node does, with one connection for all of its requests.
func (a *agent) start(ctx context.Context) error {
	config := rest.CopyConfig(a.config)
	config.Dial = a.line.dial // also keeps client-go from sharing one connection among the agents
	connection, err := rest.HTTPClientFor(config)
	if err != nil {
		return fmt.Errorf("connection of %s: %w", a.node, err)
	}
	client := &rest.Config{Host: config.Host, Transport: connection.Transport, QPS: -1}
	registry := prometheus.NewRegistry()
	duty, err := node.New(node.Config{
		NodeName: a.node, Namespace: imps.SystemNamespace, RenderedNamespace: imps.RenderedNamespace,
		Client: client, Metrics: impsync.NewMetrics(registry), Registry: registry, Log: a.log,
	})
	if err != nil {
		return fmt.Errorf("agent of %s: %w", a.node, err)
	}
	authentication, err := authenticationv1client.NewForConfig(client)
	if err != nil {
		return fmt.Errorf("client of %s: %w", a.node, err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	a.running = &running{ready: duty.Ready, cancel: cancel, done: make(chan error, 1)}
	go func(r *running) {
		// As cmd/imps-node does, to compare the node of its token with its own.
		if _, err := authentication.SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{}); err != nil && ctx.Err() == nil {
			a.log.Warn("cannot ask for the node of the token", "error", impsync.Explain(err))
		}
		r.done <- duty.Run(ctx)
	}(a.running)
	return nil
}

// stop ends it, and its connection as the end of its process would.
func (a *agent) stop() error {
	if a.running == nil {
		return nil
	}
	a.running.cancel()
	err := <-a.running.done
	a.running = nil
	a.line.hangUp()
	return err
}

// startAgents starts agents at once, and waits until each is ready.
func (s *simulation) startAgents(ctx context.Context, agents []*agent) error {
	for _, a := range agents {
		if err := a.start(ctx); err != nil {
			return err
		}
	}
	return s.await(ctx, "the agents are ready", 20*time.Millisecond, func() (bool, error) {
		for _, a := range agents {
			select {
			case err := <-a.running.done:
				a.running.done <- err
				return false, errors.Join(fmt.Errorf("the agent of %s has ended", a.node), err)
			default:
			}
			if ready := a.running.ready() == nil; !ready {
				return false, nil
			}
		}
		return true, nil
	})
}

// stopAgents stops agents at once.
func (s *simulation) stopAgents(agents []*agent) error {
	var group errgroup.Group
	for _, a := range agents {
		group.Go(a.stop)
	}
	return group.Wait()
}

// traffic are the bytes on the wire.
type traffic struct{ received, sent atomic.Int64 }

// line makes an agent's connections, and counts what passes.
type line struct {
	total *traffic

	mu    sync.Mutex
	conns []net.Conn
}

func (l *line) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: 30 * time.Second}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	counted := &countedConn{Conn: conn, total: l.total}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, counted)
	return counted, nil
}

func (l *line) hangUp() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, conn := range l.conns {
		_ = conn.Close() // it may be closed
	}
	l.conns = nil
}

type countedConn struct {
	net.Conn
	total *traffic
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.total.received.Add(int64(n))
	return n, err
}

func (c *countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.total.sent.Add(int64(n))
	return n, err
}

// warnings is what the agents log beyond information: nothing, where all is well.
type warnings struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (w *warnings) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// Write implements io.Writer for a log; it never fails.
func (w *warnings) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.Write(p)
}

// take returns the lines since the last call.
func (w *warnings) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := strings.TrimSpace(w.text.String())
	w.text.Reset()
	if text == "" {
		return nil
	}
	return strings.Split(text, "\n")
}
