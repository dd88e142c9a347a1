package integration

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// request is one raw request, as anybody with the token could send it.
type request struct {
	verb, path, contentType, body string
}

// send returns the status code of the answer.
func send(t *testing.T, config *rest.Config, r request) int {
	t.Helper()
	client, err := rest.HTTPClientFor(config)
	require.NoError(t, err)
	call, err := http.NewRequestWithContext(t.Context(), r.verb, config.Host+r.path, strings.NewReader(r.body))
	require.NoError(t, err)
	if r.contentType != "" {
		call.Header.Set("Content-Type", r.contentType)
	}
	answer, err := client.Do(call)
	require.NoError(t, err)
	require.NoError(t, answer.Body.Close())
	client.CloseIdleConnections()
	return answer.StatusCode
}

const (
	asJSON  = "application/json"
	asApply = "application/apply-patch+yaml"
	asMerge = "application/merge-patch+json"
)

// What the node identity must not do is refused by the API server, and what it needs is not.
func TestTheNodeIdentityMayDoWhatItNeedsAndNoMore(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	r := s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	s.has(namespace, "registry.one")
	config := s.config(s.nodeToken("node-a"), "intruder")

	review, err := kubernetes.NewForConfig(config)
	require.NoError(t, err)
	me, err := review.AuthenticationV1().SelfSubjectReviews().Create(t.Context(), selfReview(), metav1.CreateOptions{})
	require.NoError(t, err)
	require.Equal(t, "system:serviceaccount:"+systemNamespace+":imps-node", me.Status.UserInfo.Username)
	require.EqualValues(t, []string{"node-a"}, me.Status.UserInfo.Extra["authentication.kubernetes.io/node-name"])

	free := s.namespace(nil, nil)
	secret := func(name string) string {
		return fmt.Sprintf(`{"apiVersion":"v1","kind":"Secret","metadata":{"name":%q},"type":"kubernetes.io/dockerconfigjson","data":{".dockerconfigjson":"e30="}}`, name)
	}
	report := fmt.Sprintf(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":%q},"data":{}}`, impsync.ReportName("node-a"))
	secretsOf := func(namespace string) string { return "/api/v1/namespaces/" + namespace + "/secrets" }
	rendered := secretsOf(renderedNamespace) + "/" + impsync.RenderedName(r.UID)
	state := secretsOf(systemNamespace) + "/" + impsync.StateName(r.UID)
	source := secretsOf(sourceNamespace) + "/hub"
	pod := "/api/v1/namespaces/" + systemNamespace + "/pods"
	apply := "?fieldManager=imps-node&force=true"

	for name, c := range map[string]struct {
		request
		allowed bool
	}{
		"lists the Pods of its node":        {request{verb: "GET", path: "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-a"}, true},
		"reads a namespace":                 {request{verb: "GET", path: "/api/v1/namespaces/" + namespace}, true},
		"watches a namespace by its name":   {request{verb: "GET", path: "/api/v1/namespaces?watch=1&timeoutSeconds=1&fieldSelector=metadata.name%3D" + namespace}, true},
		"lists the rendered Secrets":        {request{verb: "GET", path: secretsOf(renderedNamespace)}, true},
		"reads a target Secret":             {request{verb: "GET", path: secretsOf(namespace) + "/" + secretName}, true},
		"creates a target Secret by apply":  {request{"PATCH", secretsOf(free) + "/" + secretName + "?fieldManager=imps-node", asApply, secret(secretName)}, true},
		"writes its report":                 {request{"PATCH", "/api/v1/namespaces/" + systemNamespace + "/configmaps/" + impsync.ReportName("node-a") + apply, asApply, report}, true},
		"creates a target Secret by POST":   {request{"POST", secretsOf(namespace), asJSON, secret(secretName)}, false},
		"lists all Secrets":                 {request{verb: "GET", path: "/api/v1/secrets"}, false},
		"lists Secrets of one name":         {request{verb: "GET", path: "/api/v1/secrets?fieldSelector=metadata.name%3D" + secretName}, false},
		"lists Secrets of another name":     {request{verb: "GET", path: "/api/v1/secrets?fieldSelector=metadata.name%3Dhub"}, false},
		"watches Secrets of one name":       {request{verb: "GET", path: "/api/v1/secrets?watch=1&timeoutSeconds=1&fieldSelector=metadata.name%3D" + secretName}, false},
		"lists the Secrets of a namespace":  {request{verb: "GET", path: secretsOf(namespace)}, false},
		"lists the sources":                 {request{verb: "GET", path: secretsOf(sourceNamespace)}, false},
		"lists imps's own Secrets":          {request{verb: "GET", path: secretsOf(systemNamespace)}, false},
		"reads a source":                    {request{verb: "GET", path: source}, false},
		"reads the state":                   {request{verb: "GET", path: state}, false},
		"reads a source by an empty patch":  {request{"PATCH", source, asMerge, `{}`}, false},
		"reads the state by an empty patch": {request{"PATCH", state, asMerge, `{}`}, false},
		"patches a rendered Secret":         {request{"PATCH", rendered, asMerge, `{}`}, false},
		"applies a rendered Secret":         {request{"PATCH", rendered + apply, asApply, secret(impsync.RenderedName(r.UID))}, false},
		"replaces a rendered Secret":        {request{"PUT", rendered, asJSON, secret(impsync.RenderedName(r.UID))}, false},
		"deletes a rendered Secret":         {request{verb: "DELETE", path: rendered}, false},
		"adds a rendered Secret":            {request{"PATCH", secretsOf(renderedNamespace) + "/imps-rendered-x" + apply, asApply, secret("imps-rendered-x")}, false},
		"applies a Secret of another name":  {request{"PATCH", secretsOf(namespace) + "/other" + apply, asApply, secret("other")}, false},
		"replaces a target Secret":          {request{"PUT", secretsOf(namespace) + "/" + secretName, asJSON, secret(secretName)}, false},
		"deletes a target Secret":           {request{verb: "DELETE", path: secretsOf(namespace) + "/" + secretName}, false},
		"deletes all of a namespace":        {request{verb: "DELETE", path: secretsOf(namespace)}, false},
		"deletes its report":                {request{verb: "DELETE", path: "/api/v1/namespaces/" + systemNamespace + "/configmaps/" + impsync.ReportName("node-a")}, false},
		"writes a ConfigMap elsewhere":      {request{"PATCH", "/api/v1/namespaces/" + namespace + "/configmaps/x" + apply, asApply, report}, false},
		"reads ImagePullSecrets":            {request{verb: "GET", path: "/apis/images.banzaicloud.io/v1alpha1/imagepullsecrets"}, false},
		"writes a status":                   {request{"PATCH", "/apis/images.banzaicloud.io/v1alpha1/imagepullsecrets/" + s.prefix + "/status", asMerge, `{}`}, false},
		"takes the Lease":                   {request{"PATCH", "/apis/coordination.k8s.io/v1/namespaces/" + systemNamespace + "/leases/73de1ad9.banzaicloud.io", asMerge, `{"spec":{"holderIdentity":"x"}}`}, false},
		"lists all namespaces":              {request{verb: "GET", path: "/api/v1/namespaces"}, true}, // RBAC cannot tell a by-name watch from this; it names and labels only
		"creates a Pod":                     {request{"POST", pod, asJSON, `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x"},"spec":{"containers":[{"name":"a","image":"b"}]}}`}, false},
		"asks for a token":                  {request{"POST", "/api/v1/namespaces/" + systemNamespace + "/serviceaccounts/imps-coordinator/token", asJSON, `{}`}, false},
		"changes a ServiceAccount":          {request{"PATCH", "/api/v1/namespaces/" + namespace + "/serviceaccounts/default", asMerge, `{}`}, false},
		"reads Nodes":                       {request{verb: "GET", path: "/api/v1/nodes"}, false},
		"writes an Event":                   {request{"POST", "/api/v1/namespaces/default/events", asJSON, `{}`}, false},
		"impersonates":                      {request{"POST", "/apis/authentication.k8s.io/v1/tokenreviews", asJSON, `{}`}, false},
		"evicts":                            {request{"POST", pod + "/x/eviction", asJSON, `{}`}, false},
	} {
		t.Run(name, func(t *testing.T) {
			code := send(t, config, c.request)
			if c.allowed {
				require.Less(t, code, 300)
			} else {
				require.Equal(t, http.StatusForbidden, code)
			}
		})
	}
}

// The coordinator may do more, but not everything either.
func TestTheCoordinatorIdentityIsPinned(t *testing.T) {
	s := newSystem(t)
	token, err := control.Token(t.Context(), systemNamespace, "imps-coordinator")
	require.NoError(t, err)
	config := s.config(token, "intruder")
	namespace := s.namespace(nil, nil)
	foreign := s.writeSecret(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "foreign"}})
	path := "/api/v1/namespaces/" + namespace + "/secrets"
	for name, c := range map[string]struct {
		request
		allowed bool
	}{
		"watches Secrets of an allowed name":  {request{verb: "GET", path: "/api/v1/secrets?watch=1&timeoutSeconds=1&fieldSelector=metadata.name%3D" + secretName}, true},
		"lists Secrets of an allowed name":    {request{verb: "GET", path: "/api/v1/secrets?fieldSelector=metadata.name%3D" + secretName}, true},
		"reads its sources":                   {request{verb: "GET", path: "/api/v1/namespaces/" + sourceNamespace + "/secrets"}, true},
		"lists all Secrets":                   {request{verb: "GET", path: "/api/v1/secrets"}, false},
		"lists Secrets of another name":       {request{verb: "GET", path: "/api/v1/secrets?fieldSelector=metadata.name%3Dforeign"}, false},
		"lists the Secrets of some namespace": {request{verb: "GET", path: path}, false},
		"reads a foreign Secret":              {request{verb: "GET", path: path + "/" + foreign.Name}, false},
		"reads it by an empty patch":          {request{"PATCH", path + "/" + foreign.Name, asMerge, `{}`}, false},
		"deletes a foreign Secret":            {request{verb: "DELETE", path: path + "/" + foreign.Name}, false},
		"deletes all of a namespace":          {request{verb: "DELETE", path: path}, false},
		"creates a Secret of another name":    {request{"PATCH", path + "/other?fieldManager=imps-node", asApply, `{"apiVersion":"v1","kind":"Secret","metadata":{"name":"other"}}`}, false},
		"changes its sources":                 {request{"PATCH", "/api/v1/namespaces/" + sourceNamespace + "/secrets/hub", asMerge, `{}`}, false},
		"changes a resource's spec":           {request{"PATCH", "/apis/images.banzaicloud.io/v1alpha1/imagepullsecrets/x", asMerge, `{}`}, false},
		"takes another Lease":                 {request{"PATCH", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/x", asMerge, `{}`}, false},
		"reads Pods":                          {request{verb: "GET", path: "/api/v1/pods"}, false},
		"asks for a token":                    {request{"POST", "/api/v1/namespaces/" + systemNamespace + "/serviceaccounts/imps-node/token", asJSON, `{}`}, false},
	} {
		t.Run(name, func(t *testing.T) {
			code := send(t, config, c.request)
			if c.allowed {
				require.Less(t, code, 300)
			} else {
				require.Equal(t, http.StatusForbidden, code)
			}
		})
	}
}

// An agent's target names hold in every namespace, also in that of the rendered Secrets:
// what it can put there must not pass for a rendered one.
func TestASecretThatAnAgentSmugglesInIsNotRendered(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	r := s.resource(s.prefix, spec(`  namespaces: {names: [elsewhere-`+s.prefix+`]}`))
	s.ready(s.prefix, 0)
	good := s.secret(renderedNamespace, impsync.RenderedName(r.UID))
	require.NotNil(t, good)
	namespace := s.namespace(nil, nil)
	record := strings.ReplaceAll(string(good.Data["rendered"]), "elsewhere-"+s.prefix, namespace)
	_, err := s.core.CoreV1().Secrets(renderedNamespace).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: secretName}, Type: impsync.RenderedType,
		Data: map[string][]byte{"formatVersion": good.Data["formatVersion"], "rendered": []byte(record), "target": good.Data["target"]},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = s.core.CoreV1().Secrets(renderedNamespace).Delete(ctxOf(t), secretName, metav1.DeleteOptions{})
	})
	s.agent("node-a")
	s.pod(namespace, "node-a", nil, nil)
	barrier := "elsewhere-" + s.prefix
	_, err = s.core.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: barrier}}, metav1.CreateOptions{})
	require.NoError(t, err)
	s.pod(barrier, "node-a", nil, nil)
	s.has(barrier, "registry.one")
	require.Nil(t, s.secret(namespace, secretName))
	require.NoError(t, s.core.CoreV1().Namespaces().Delete(t.Context(), barrier, metav1.DeleteOptions{}))
}

// The search for the canary credential finds it.
func TestTheCanaryIsFoundWhereItStands(t *testing.T) {
	for form, text := range map[string]string{
		"raw":                     "x " + canaryPassword + " y",
		"base64":                  base64Of(canaryPassword),
		"base64 of user:password": base64Of(canaryUser + ":" + canaryPassword),
		"a rendered Secret's own": string(rendered(t)),
	} {
		require.Error(t, findCanary("here", text), form)
	}
	require.NoError(t, findCanary("here", canaryUser))
	require.Contains(t, logs.String(), `"level":"DEBUG`, "there are logs of the highest verbosity to look into")
}
