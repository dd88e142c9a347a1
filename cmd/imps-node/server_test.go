package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"k8s.io/client-go/util/workqueue"
)

// fakeDuty is a duty that does as it is told.
type fakeDuty struct {
	run   func(context.Context) error
	ready error
}

func (d fakeDuty) Run(ctx context.Context) error { return d.run(ctx) }
func (d fakeDuty) Ready() error                  { return d.ready }

func TestHealth(t *testing.T) {
	t.Parallel()
	ready, not := fakeDuty{}, fakeDuty{ready: errors.New("the cluster duty has not read the cluster yet")}
	tests := map[string]struct {
		duties []duty
		method string
		path   string
		code   int
		body   string
	}{
		"alive though not ready":             {[]duty{not}, http.MethodGet, "/healthz", http.StatusOK, "ok\n"},
		"ready":                              {[]duty{ready, ready}, http.MethodGet, "/readyz", http.StatusOK, "ok\n"},
		"not ready where one duty is not":    {[]duty{ready, not}, http.MethodGet, "/readyz", http.StatusServiceUnavailable, "the cluster duty has not read the cluster yet\n"},
		"both reasons where neither is":      {[]duty{not, fakeDuty{ready: errors.New("nor this")}}, http.MethodGet, "/readyz", http.StatusServiceUnavailable, "the cluster duty has not read the cluster yet\nnor this\n"},
		"no metrics where anybody may reach": {[]duty{ready}, http.MethodGet, "/metrics", http.StatusNotFound, "404 page not found\n"},
		"nothing else":                       {[]duty{ready}, http.MethodGet, "/", http.StatusNotFound, "404 page not found\n"},
		"nothing but reading":                {[]duty{ready}, http.MethodPost, "/readyz", http.StatusMethodNotAllowed, "Method Not Allowed\n"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			recorder := httptest.NewRecorder()
			healthHandler(test.duties).ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), test.method, test.path, nil))
			require.Equal(t, test.code, recorder.Code)
			require.Equal(t, test.body, recorder.Body.String())
		})
	}
}

func scrape(t *testing.T, registry *prometheus.Registry, path string) (int, string) {
	t.Helper()
	recorder := httptest.NewRecorder()
	metricsHandler(registry).ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
	return recorder.Code, recorder.Body.String()
}

func TestMetricsOfProcessAndClient(t *testing.T) {
	t.Parallel()
	registry := newRegistry()
	requests, queues := newClientGoMetrics(registry)
	requests.Increment(t.Context(), "200", "GET", "10.0.0.1:443")
	requests.Observe(t.Context(), "GET", url.URL{Host: "10.0.0.1:443", Path: "/api/v1/namespaces/team-a/secrets/pull"}, 3*time.Millisecond)
	later := workqueue.NewTypedItemExponentialFailureRateLimiter[string](time.Hour, time.Hour) // not while the test looks
	queue := workqueue.NewTypedRateLimitingQueueWithConfig(later,
		workqueue.TypedRateLimitingQueueConfig[string]{Name: "things", MetricsProvider: queues})
	defer queue.ShutDown()
	queue.Add("one")
	item, _ := queue.Get()
	queue.AddRateLimited(item)
	queue.Done(item)

	code, metrics := scrape(t, registry, "/metrics")
	require.Equal(t, http.StatusOK, code)
	for _, want := range []string{
		`imps_build_info{goversion="go1.`, `version="dev"} 1`,
		"go_goroutines ", "process_resident_memory_bytes ",
		`rest_client_requests_total{code="200",host="10.0.0.1:443",method="GET"} 1`,
		`rest_client_request_duration_seconds_bucket{host="10.0.0.1:443",verb="GET",le="0.005"} 1`,
		`workqueue_adds_total{name="things"} 1`,
		`workqueue_depth{name="things"} 0`,
		`workqueue_retries_total{name="things"} 1`,
		`workqueue_queue_duration_seconds_count{name="things"} 1`,
		`workqueue_work_duration_seconds_count{name="things"} 1`,
		`workqueue_unfinished_work_seconds{name="things"} 0`,
		`workqueue_longest_running_processor_seconds{name="things"} 0`,
	} {
		require.Contains(t, metrics, want)
	}
	require.NotContains(t, metrics, "team-a", "a URL is no label")

	code, _ = scrape(t, registry, "/readyz")
	require.Equal(t, http.StatusNotFound, code)
}

// discard is a logger of tests that look at no log.
func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestServersRunAsLongAsTheDuties(t *testing.T) {
	t.Parallel()
	health, err := listen(t.Context(), "127.0.0.1:0", healthHandler(nil), discard())
	require.NoError(t, err)
	off, err := listen(t.Context(), "0", healthHandler(nil), discard())
	require.NoError(t, err)
	require.Equal(t, "off", off.address())

	ctx, stop := context.WithCancel(t.Context())
	answered := make(chan error, 1)
	finishing := fakeDuty{run: func(ctx context.Context) error {
		stop()
		<-ctx.Done()
		answered <- get(context.WithoutCancel(ctx), "http://"+health.address()+"/healthz")
		return nil
	}}
	require.NoError(t, serve(ctx, []duty{finishing}, health, off))
	require.NoError(t, <-answered, "alive while a duty finishes what is in flight")
	require.Error(t, get(t.Context(), "http://"+health.address()+"/healthz"))
}

func get(ctx context.Context, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, response.Body)
	return errors.Join(err, response.Body.Close())
}

func TestAnAddressThatIsTakenIsAnError(t *testing.T) {
	t.Parallel()
	first, err := listen(t.Context(), "127.0.0.1:0", healthHandler(nil), discard())
	require.NoError(t, err)
	defer func() { require.NoError(t, first.listener.Close()) }()
	_, err = listen(t.Context(), first.address(), healthHandler(nil), discard())
	require.ErrorContains(t, err, "address already in use")
}

func TestOneDutyThatFailsEndsTheOthers(t *testing.T) {
	t.Parallel()
	waiting := fakeDuty{run: func(ctx context.Context) error { <-ctx.Done(); return nil }}
	health, err := listen(t.Context(), "127.0.0.1:0", healthHandler(nil), discard())
	require.NoError(t, err)
	failing := fakeDuty{run: func(context.Context) error { return errors.New("cannot go on") }}
	require.EqualError(t, serve(t.Context(), []duty{waiting, failing}, health), "cannot go on")

	health, err = listen(t.Context(), "127.0.0.1:0", healthHandler(nil), discard())
	require.NoError(t, err)
	panicking := fakeDuty{run: func(context.Context) error { panic("p4ssw0rd") }}
	err = serve(t.Context(), []duty{waiting, panicking}, health)
	require.ErrorContains(t, err, "panic of type string at:")
	require.ErrorContains(t, err, "server_test.go")
	require.NotContains(t, err.Error(), "p4ssw0rd")
}
