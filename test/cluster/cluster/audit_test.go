package cluster

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

func TestAudit(t *testing.T) {
	namespace := shared.Namespace(t, nil)
	agent := Prefix(t)
	cfg := shared.Admin()
	cfg.UserAgent = agent
	maps := clientFor(t, cfg).CoreV1().ConfigMaps(namespace)
	ours := func(e Event) bool { return e.UserAgent == agent }

	t.Run("three gets are three events, however often it is tried", func(t *testing.T) {
		for range 20 {
			mark := shared.Audit().Mark()
			for range 3 {
				_, err := maps.Get(t.Context(), "absent", metav1.GetOptions{})
				require.Error(t, err)
			}
			events := eventsOf(t, mark, ours)
			require.Len(t, events, 3)
			for _, event := range events {
				require.NotEmpty(t, event.ID)
				require.False(t, event.Received.IsZero())
				require.False(t, event.Written.Before(event.Received))
				event.ID, event.Received, event.Written = "", events[0].Received, events[0].Written
				require.Equal(t, Event{
					Stage: StageComplete, Verb: "get", User: "admin", UserAgent: agent,
					URI:      "/api/v1/namespaces/" + namespace + "/configmaps/absent",
					Resource: "configmaps", Namespace: namespace, Name: "absent", Code: 404,
					Received: events[0].Received, Written: events[0].Written,
				}, event)
			}
		}
	})

	t.Run("what was answered before the mark is not after it", func(t *testing.T) {
		for range 20 {
			_, err := maps.List(t.Context(), metav1.ListOptions{})
			require.NoError(t, err)
			require.Empty(t, eventsOf(t, shared.Audit().Mark(), ours))
		}
	})

	t.Run("a watch is an event when it begins and one when it ends", func(t *testing.T) {
		mark := shared.Audit().Mark()
		watcher, err := maps.Watch(t.Context(), metav1.ListOptions{})
		require.NoError(t, err)
		begun := eventsOf(t, mark, ours)
		require.Len(t, begun, 1)
		require.Equal(t, StageStarted, begun[0].Stage)
		require.Equal(t, "watch", begun[0].Verb)

		watcher.Stop()
		require.Eventually(t, func() bool { return len(eventsOf(t, mark, ours)) == 2 }, pollLimit, pollInterval)
		ended := eventsOf(t, mark, ours)[1]
		require.Equal(t, StageComplete, ended.Stage)
		require.Equal(t, begun[0].ID, ended.ID)
	})

	t.Run("an impersonated user is named beside the real one", func(t *testing.T) {
		cfg := rest.CopyConfig(cfg)
		cfg.Impersonate = rest.ImpersonationConfig{UserName: "jane"}
		mark := shared.Audit().Mark()
		_, err := clientFor(t, cfg).CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{})
		require.Error(t, err)
		events := eventsOf(t, mark, ours)
		require.Len(t, events, 1)
		require.Equal(t, "admin", events[0].User)
		require.Equal(t, "jane", events[0].Impersonated)
		require.Equal(t, 403, events[0].Code)
	})
}

func TestAuditFile(t *testing.T) {
	t.Parallel()
	const line = `{"auditID":"1","stage":"ResponseComplete","verb":"get"}` + "\n"
	log := func(t *testing.T, text string) *Audit {
		t.Helper()
		path := filepath.Join(t.TempDir(), auditLogFile)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return &Audit{path: path}
	}

	t.Run("a line that is being written is not read yet", func(t *testing.T) {
		t.Parallel()
		events, err := log(t, line+`{"auditID":"2`).Since(0)
		require.NoError(t, err)
		require.Len(t, events, 1)
	})

	t.Run("a line that is half written at a mark is read whole after it", func(t *testing.T) {
		t.Parallel()
		audit := log(t, line+line[:20])
		mark := audit.Mark()
		require.NoError(t, os.WriteFile(audit.path, []byte(line+line), 0o600))
		events, err := audit.Since(mark)
		require.NoError(t, err)
		require.Len(t, events, 1)
	})

	t.Run("a line that will never be finished is dropped", func(t *testing.T) {
		t.Parallel()
		audit := log(t, line+`{"auditID":"2`)
		require.NoError(t, audit.dropPartial())
		require.Equal(t, Mark(len(line)), audit.Mark())
		require.NoError(t, audit.dropPartial())
		require.Equal(t, Mark(len(line)), audit.Mark())
	})

	t.Run("a line that is no event is an error", func(t *testing.T) {
		t.Parallel()
		for _, text := range []string{"{}\n", "nonsense\n"} {
			_, err := log(t, text).Since(0)
			require.ErrorContains(t, err, "read the audit log")
		}
	})
}

func eventsOf(t *testing.T, mark Mark, match func(Event) bool) []Event {
	t.Helper()
	events, err := shared.Audit().Since(mark)
	require.NoError(t, err)
	var matching []Event
	for _, event := range events {
		if match(event) {
			matching = append(matching, event)
		}
	}
	return matching
}
