package sync

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
)

// Whoever may make Pods names their controllers as he likes, and must not have anything else read for it.
func TestTheNameOfAControllerLeadsNowhereElse(t *testing.T) {
	t.Parallel()
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Path)
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"metadata":{"uid":"u"},"spec":{"template":{"spec":{"serviceAccountName":"x"}}}}`))
	}))
	defer server.Close()
	client, err := corev1client.NewForConfig(&rest.Config{Host: server.URL})
	require.NoError(t, err)
	yes := true
	of := func(apiVersion, kind, name string) *corev1.PodSpec {
		template, err := TemplateOf(t.Context(), client.RESTClient(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Namespace: "n", OwnerReferences: []metav1.OwnerReference{{APIVersion: apiVersion, Kind: kind, Name: name, UID: "u", Controller: &yes}},
		}})
		require.NoError(t, err)
		return template
	}
	for _, name := range []string{"../../../../../../api/v1/secrets", "a/b", "..", "."} {
		require.Nil(t, of("apps/v1", "ReplicaSet", name))
	}
	require.Nil(t, of("argoproj.io/v1alpha1", "Rollout", "app"))
	require.Empty(t, asked)
	require.Equal(t, "x", of("apps/v1", "ReplicaSet", "app").ServiceAccountName)
	require.Equal(t, "x", of("v1", "ReplicationController", "app").ServiceAccountName)
	require.Nil(t, of("batch/v1", "Job", "app"), "which may not fail once more")
	require.Equal(t, []string{"/apis/apps/v1/namespaces/n/replicasets/app", "/api/v1/namespaces/n/replicationcontrollers/app", "/apis/batch/v1/namespaces/n/jobs/app"}, asked)
}
