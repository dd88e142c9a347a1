package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// defaultEtcdQuota is the largest size that etcd recommends.
const defaultEtcdQuota = 8 << 30

// WithEtcdQuota limits the size of etcd's data. Beyond it, every write is
// refused until FreeEtcd; etcd looks at the size of its file, which grows with
// the history of objects as well.
func WithEtcdQuota(bytes int64) Option {
	return func(s *settings) { s.etcdQuota = bytes }
}

// CompactEtcd drops the history of all objects. A watch or a list of an older
// resourceVersion is answered with 410 from then on, but only where the API
// server asks etcd: what its own memory still holds it goes on serving. That
// is lost with StopAPIServer.
func (c *Cluster) CompactEtcd(ctx context.Context) error {
	status, err := c.callEtcd(ctx, "maintenance/status", struct{}{})
	if err != nil {
		return err
	}
	_, err = c.callEtcd(ctx, "kv/compaction", map[string]any{"revision": status.Revision, "physical": true})
	return err
}

// FreeEtcd makes room in an etcd that has reached its quota, and has it accept
// writes again: it drops the history of all objects. What fills etcd with
// objects themselves has to be deleted first; deletes are not refused.
func (c *Cluster) FreeEtcd(ctx context.Context) error {
	if err := c.CompactEtcd(ctx); err != nil {
		return err
	}
	if _, err := c.callEtcd(ctx, "maintenance/defragment", struct{}{}); err != nil {
		return err
	}
	status, err := c.callEtcd(ctx, "maintenance/status", struct{}{})
	if err != nil {
		return err
	}
	_, err = c.callEtcd(ctx, "maintenance/alarm", map[string]any{"action": "DEACTIVATE", "alarm": "NOSPACE", "memberID": status.Member})
	return err
}

// etcdHeader is what etcd's answers say about itself; some leave it out.
type etcdHeader struct {
	Member   string `json:"member_id"`
	Revision string `json:"revision"`
}

// callEtcd asks etcd through its JSON gateway, so that nothing here depends on
// etcd's client.
func (c *Cluster) callEtcd(ctx context.Context, method string, request any) (etcdHeader, error) {
	var none etcdHeader
	body, err := json.Marshal(request)
	if err != nil {
		return none, fmt.Errorf("encode a request for etcd: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	// The host is not looked at.
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://etcd/v3/"+method, bytes.NewReader(body))
	if err != nil {
		return none, fmt.Errorf("build a request for etcd: %w", err)
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", c.dir.path(etcdSocket))
	}}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		return none, fmt.Errorf("ask etcd for %s: %w", method, err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return none, fmt.Errorf("read etcd's answer to %s: %w", method, err)
	}
	if resp.StatusCode != http.StatusOK {
		return none, fmt.Errorf("ask etcd for %s: %s: %s", method, resp.Status, text)
	}
	var answer struct {
		Header etcdHeader `json:"header"`
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return none, fmt.Errorf("parse etcd's answer to %s: %w", method, err)
	}
	return answer.Header, nil
}
