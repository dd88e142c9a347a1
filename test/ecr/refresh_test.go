package ecr

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/test/fakeaws"
	"github.com/imps-node/imps/test/imps"
)

// refresher is a namespace in which imps-node refresh may read two sources and write one target, and nothing else.
type refresher struct {
	*system
	namespace string
	process   *imps.Process
}

func newRefresher(t *testing.T) *refresher {
	t.Helper()
	s := newSystem(t)
	r := &refresher{system: s, namespace: s.namespace()}
	ctx := t.Context()
	meta := metav1.ObjectMeta{Name: "refresher", Namespace: r.namespace}
	_, err := s.core.CoreV1().ServiceAccounts(r.namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = s.core.RbacV1().Roles(r.namespace).Create(ctx, &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"hub", "my.ecr"}, Verbs: []string{"get", "list", "watch"}},
		{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"pull"}, Verbs: []string{"get", "list", "watch", "create", "patch"}},
	}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = s.core.RbacV1().RoleBindings(r.namespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "refresher"},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "refresher", Namespace: r.namespace}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	return r
}

// start runs it, with the flags that banzaicloud/imps's refresher had.
func (r *refresher) start() {
	r.t.Helper()
	token, err := control.Token(r.t.Context(), r.namespace, "refresher")
	require.NoError(r.t, err)
	process, err := imps.Start(context.WithoutCancel(r.t.Context()), control, binary, r.dir, imps.Spec{
		Name: "refresh", Config: control.ConfigForToken(token),
		Args: []string{
			"refresh", "--target-secret=" + r.namespace + ".pull", "--source-secret=" + r.namespace + ".hub", "--source-secret=" + r.namespace + ".my.ecr",
			"--periodic-reconcile-interval=300", "--log.level=info",
		},
		Env: []string{
			"AWS_ENDPOINT_URL_ECR=" + r.awsURL, "AWS_ENDPOINT_URL_STS=" + r.awsURL, "AWS_EC2_METADATA_DISABLED=true",
			"AWS_CONFIG_FILE=" + os.DevNull, "AWS_SHARED_CREDENTIALS_FILE=" + os.DevNull,
		},
	})
	require.NoError(r.t, err)
	r.process = process
	r.t.Cleanup(r.stop)
}

func (r *refresher) stop() {
	select {
	case <-r.process.Ended():
	default:
		require.NoError(r.t, r.process.Terminate())
	}
}

func (r *refresher) write(name string, secretType corev1.SecretType, data map[string]string) *corev1.Secret {
	r.t.Helper()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name}, Type: secretType, StringData: data}
	secrets := r.core.CoreV1().Secrets(r.namespace)
	written, err := secrets.Create(r.t.Context(), secret, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		written, err = secrets.Update(r.t.Context(), secret, metav1.UpdateOptions{})
	}
	require.NoError(r.t, err)
	return written
}

func (r *refresher) hub(config string) {
	r.t.Helper()
	r.write("hub", corev1.SecretTypeDockerConfigJson, map[string]string{corev1.DockerConfigJsonKey: config})
}

func (r *refresher) keys(secretKey string) {
	r.t.Helper()
	r.write("my.ecr", "banzaicloud.io/aws-ecr-login-config", map[string]string{
		"accountID": "123456789012", "region": "eu-central-1", "accessKeyID": "AKIACUSTOMER", "secretKey": secretKey,
	})
}

func (r *refresher) delete(name string) {
	r.t.Helper()
	require.NoError(r.t, r.core.CoreV1().Secrets(r.namespace).Delete(r.t.Context(), name, metav1.DeleteOptions{}))
}

// holds waits until the target has credentials for exactly these registries, "host=password" or "host" for a good token.
func (r *refresher) holds(registries ...string) *corev1.Secret {
	r.t.Helper()
	var secret *corev1.Secret
	r.eventually(func() error {
		var err error
		if secret, err = r.core.CoreV1().Secrets(r.namespace).Get(r.t.Context(), "pull", metav1.GetOptions{}); err != nil {
			return err
		}
		var config struct {
			Auths map[string]auth `json:"auths"`
		}
		if err := json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config); err != nil {
			return errors.New("it is no docker config")
		}
		var have []string
		for host, a := range config.Auths {
			if r.aws.Opens("eu-central-1", false, a.Username, a.Password) {
				have = append(have, host)
			} else {
				have = append(have, host+"="+a.Password)
			}
		}
		slices.Sort(have)
		slices.Sort(registries)
		if !slices.Equal(have, registries) {
			return fmt.Errorf("it has %d registries", len(have))
		}
		return nil
	}, "the target does not hold %v", registries)
	return secret
}

func (r *refresher) logged(text string) {
	r.t.Helper()
	r.eventually(func() error {
		raw, err := os.ReadFile(r.process.LogFile)
		if err == nil && !strings.Contains(string(raw), text) {
			err = errors.New("it is not in the log")
		}
		return err
	}, "%q is not logged", text)
}

const one, two = `{"auths":{"registry.one":{"username":"u","password":"1"}}}`, `{"auths":{"registry.one":{"username":"u","password":"2"}}}`

// K18: what banzaicloud/imps's refresher did, with the rights of one namespace.
func TestRefresh(t *testing.T) {
	r := newRefresher(t)
	r.aws.Life = 90 * time.Second
	r.hub(one)
	r.keys(canary + "-customer")
	r.start()
	first := r.holds("registry.one=1", frankfurt)
	require.Equal(t, corev1.SecretTypeDockerConfigJson, first.Type)
	require.Empty(t, first.OwnerReferences)

	r.hub(two)
	second := r.holds("registry.one=2", frankfurt)
	require.Equal(t, first.UID, second.UID, "in place")
	r.delete("pull")
	third := r.holds("registry.one=2", frankfurt)
	require.NotEqual(t, first.UID, third.UID)
	r.write("pull", corev1.SecretTypeDockerConfigJson, map[string]string{corev1.DockerConfigJsonKey: `{"auths":{"other.one":{"username":"u","password":"x"}}}`})
	r.holds("registry.one=2", frankfurt)

	r.hub(`{"auths":{"registry.one":{"auth":"!"}}}`)
	r.logged("its last good credentials stay in use")
	r.holds("registry.one=2", frankfurt)
	require.Equal(t, 1, r.mints(), "one token for all of that")

	// The process begins anew, and what the broken source gave stands only in the target.
	r.stop()
	r.start()
	r.eventually(func() error {
		if n := r.mints(); n == 0 {
			return errors.New("no token was asked for")
		}
		return nil
	}, "it does not begin anew")
	r.holds("registry.one=2", frankfurt)
	r.hub(one)
	r.holds("registry.one=1", frankfurt)
	r.delete("hub")
	r.holds(frankfurt)

	before := r.aws.Grants()
	imps.Eventually(t, 2*time.Minute, func() error {
		grants := r.aws.Grants()
		if len(grants) == len(before) {
			return errors.New("AWS was not asked")
		}
		renewed, err := r.core.CoreV1().Secrets(r.namespace).Get(t.Context(), "pull", metav1.GetOptions{})
		if err == nil && !strings.Contains(string(renewed.Data[corev1.DockerConfigJsonKey]), grants[len(before)].Password) {
			err = errors.New("the new token has not arrived")
		}
		return err
	}, "the token is not renewed")
	r.holds(frankfurt)
}

// A target of another type cannot be changed, and is told.
func TestRefreshOfASecretOfAnotherType(t *testing.T) {
	r := newRefresher(t)
	users := r.write("pull", corev1.SecretTypeOpaque, map[string]string{"mine": "x"})
	r.hub(one)
	r.keys(canary + "-wrong")
	r.start()
	r.logged("it is there with the type Opaque, and has to be of type kubernetes.io/dockerconfigjson: delete it, or name another one")
	r.logged("the secret key is wrong (InvalidSignatureException)")
	now, err := r.core.CoreV1().Secrets(r.namespace).Get(t.Context(), "pull", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, users.ResourceVersion, now.ResourceVersion)
	r.delete("pull")
	r.holds("registry.one=1")
	r.aws.Faults(func(fakeaws.Call) *fakeaws.Fault { return &fakeaws.Fault{Code: "ThrottlingException"} })
	r.keys(canary + "-customer")
	r.logged("AWS throttles")
	r.holds("registry.one=1")
	r.aws.Faults(nil)
	r.holds("registry.one=1", frankfurt)
}
